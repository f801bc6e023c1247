"""A probe for drift: a fresh classifier learns to tell the policy's responses from the supervision's.

Its AUC on prompts that it has not seen is 0.5 where the two cannot be told apart, and 1 where they always can (a
classifier two-sample test; Lopez-Paz and Oquab, arXiv 1610.06545). It reads the length, embeddings, and counts of words
and pairs of words: embeddings know what was said, counts find a single mark that an average over a whole response would
drown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prism_pl.metrics.bootstrap import Interval
from prism_pl.metrics.pair_bootstrap import pair_interval

NUM_WORDS = 4096  # columns that words and pairs of words are hashed into
# Words, line breaks and every other mark: bullets and punctuation are style.
WORD = r"\w+|[^\w\s]|\n"
MOST_BINS = 64


@dataclass(frozen=True)
class Side:
    """N responses of one side.

    Attributes:
        texts: with white space normalised alike on both sides.
        prompt_N: the number of each one's prompt, 0 ... P - 1.
        lengths_N: in tokens.
        embeddings_NH: of one embedder for both sides.
    """

    texts: Sequence[str]
    prompt_N: np.ndarray
    lengths_N: np.ndarray
    embeddings_NH: np.ndarray


def probe_intervals(
    policy: Side, supervision: Side, num_folds: int = 5, num_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """AUC of the probe, and the same where length cannot help it.

    A prompt's responses of both sides stand in one fold, so that no prompt is both learnt from and judged. Scores of
    different folds come from different probes: only responses of one fold are compared. The intervals resample prompts
    and leave the probes as they are, so that they do not tell how other training prompts would have made other probes:
    where there was nothing to find, 5 in 6 of them held 0.5.

    Returns:
        `auc`, and `auc_length_matched`: the probe is trained with weights that give both sides the same distribution of
        lengths, and only responses of the same length are compared (up to a bin, where there are more than 64 lengths).
        NaN where the sides have too few lengths in common, or there are fewer prompts than folds.
    """
    labels_N = np.concatenate([np.ones(len(policy.texts)), np.zeros(len(supervision.texts))])
    prompt_N = np.concatenate([policy.prompt_N, supervision.prompt_N])
    lengths_N = np.concatenate([policy.lengths_N, supervision.lengths_N])
    bins_N = length_bins(lengths_N)
    num_prompts = int(prompt_N.max()) + 1 if len(prompt_N) else 0
    if len(np.unique(prompt_N)) < num_folds:
        nan = Interval(float("nan"), float("nan"), float("nan"), num_prompts)
        return {"auc": nan, "auc_length_matched": nan}
    words = _words([*policy.texts, *supervision.texts])
    # Rows of each part have a length near 1: none rules the penalty.
    embeddings_NH = np.concatenate([policy.embeddings_NH, supervision.embeddings_NH])
    numbers_NK = np.column_stack([np.log1p(lengths_N), embeddings_NH])
    weight_K = np.r_[1, np.full(embeddings_NH.shape[1], 1 / np.sqrt(embeddings_NH.shape[1]))]
    found = {}
    for name, matched in (("auc", False), ("auc_length_matched", True)):
        scores_N, fold_N = _out_of_fold(numbers_NK, weight_K, words, labels_N, prompt_N, bins_N, num_folds, matched)
        strata_N = fold_N * (bins_N.max() + 1) + bins_N if matched else fold_N
        sums_PP, counts_PP = concordance(scores_N, labels_N, prompt_N, strata_N, num_prompts)
        found[name] = pair_interval(sums_PP, counts_PP, num_resamples, level, seed)
    return found


def concordance(
    scores_N: np.ndarray, labels_N: np.ndarray, prompt_N: np.ndarray, strata_N: np.ndarray, num_prompts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Over pairs of a response with label 1 and one with label 0 in the same stratum, by the prompts of the two: how
    often the first has the higher score (a tie counts half), and how many pairs there are; both (P, P). Their sums'
    ratio is the AUC. Responses without a score (NaN) make no pair."""
    sums_PP, counts_PP = np.zeros((num_prompts, num_prompts)), np.zeros((num_prompts, num_prompts))
    for stratum in np.unique(strata_N):
        of_stratum = (strata_N == stratum) & ~np.isnan(scores_N)
        ones, zeros = (np.flatnonzero(of_stratum & (labels_N == label)) for label in (1, 0))
        gaps = scores_N[ones][:, None] - scores_N[zeros][None, :]
        place = (prompt_N[ones][:, None], prompt_N[zeros][None, :])
        np.add.at(sums_PP, place, 0.5 * (np.sign(gaps) + 1))
        np.add.at(counts_PP, place, np.ones_like(gaps))
    return sums_PP, counts_PP


def length_bins(lengths_N: np.ndarray, most: int = MOST_BINS) -> np.ndarray:
    """Each length as a number of its own, or the bin of about equally many responses that it lies in where there are
    more than `most` lengths."""
    distinct, number_N = np.unique(lengths_N, return_inverse=True)
    if len(distinct) <= most:
        return number_N
    edges = np.unique(np.quantile(lengths_N, np.linspace(0, 1, most + 1)[1:-1]))
    return np.searchsorted(edges, lengths_N, side="right")


def matching_weights(labels_N: np.ndarray, bins_N: np.ndarray) -> np.ndarray:
    """Weights under which both labels have the same distribution over bins, the part that the two have in common; 0
    where a bin has one label only. The mean is 1, or all are 0 where no bin has both."""
    shares = [np.bincount(bins_N[labels_N == label], minlength=bins_N.max() + 1) for label in (0, 1)]
    shares = [counts / max(counts.sum(), 1) for counts in shares]
    common = np.minimum(*shares)
    weights_N = np.zeros(len(labels_N))
    for label, share in enumerate(shares):
        of_label = labels_N == label
        weights_N[of_label] = (common / np.where(share > 0, share, 1))[bins_N[of_label]]
    return weights_N / weights_N.mean() if weights_N.any() else weights_N


def _out_of_fold(
    numbers_NK: np.ndarray,
    weight_K: np.ndarray,
    words: Any,
    labels_N: np.ndarray,
    prompt_N: np.ndarray,
    bins_N: np.ndarray,
    num_folds: int,
    matched: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of each response by the probe that was trained on the other folds (NaN where there was nothing to train
    on), and the fold. `numbers_NK` are scaled to `weight_K` by what the probe is trained on."""
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.preprocessing import StandardScaler

    scores_N, fold_N = np.full(len(labels_N), np.nan), np.zeros(len(labels_N), dtype=np.int64)
    for fold, (train, held_out) in enumerate(GroupKFold(num_folds).split(numbers_NK, labels_N, prompt_N)):
        fold_N[held_out] = fold
        weights = np.ones(len(train))
        if matched:
            weights = matching_weights(labels_N[train], bins_N[train])
        kept = train[weights > 0]
        if len(np.unique(labels_N[kept])) < 2:
            continue
        scaled_NK = StandardScaler().fit(numbers_NK[train]).transform(numbers_NK) * weight_K
        features: Any = sparse.hstack([sparse.csr_matrix(scaled_NK), words], format="csr")
        probe = LogisticRegression(solver="liblinear", class_weight="balanced", random_state=0)
        probe.fit(features[kept], labels_N[kept], sample_weight=weights[weights > 0])
        scores_N[held_out] = probe.decision_function(features[held_out])
    return scores_N, fold_N


def _words(texts: Sequence[str]) -> Any:
    """Hashed counts of words and pairs of words, each row of length 1: a long response is not a large one."""
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(token_pattern=WORD, ngram_range=(1, 2), n_features=NUM_WORDS).transform(texts)
