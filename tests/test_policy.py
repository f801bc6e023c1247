"""The policy against transformers' own forward pass, and what it refuses."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from prism_pl.batch import SequenceBatch, in_order, micro_batches
from prism_pl.errors import UsageError
from prism_pl.logprobs import chunked_logps, token_logps
from prism_pl.policy import PolicySpec, build_policy, check_policy_path, save_policy
from tests.conftest import make_examples


def encode(processor, examples, prompt_of=None) -> SequenceBatch:
    prompts = [processor.prompt(example) for example in examples]
    prompt_of = list(range(len(examples))) if prompt_of is None else prompt_of
    # Responses of different lengths, so that padding is really there.
    responses = [processor.response_ids(examples[p].response)[n % 4 :] for n, p in enumerate(prompt_of)]
    return processor.sequences(prompts, responses, prompt_of)


def stock_logps(policy, processor, batch: SequenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own forward pass: its own positions, its own vision loop, all logits."""
    mask = (torch.arange(batch.input_ids_BS.shape[1])[None] < batch.lengths_B[:, None]).long()
    types = (batch.input_ids_BS == processor.image_token_id).int()
    pixels = batch.pixel_values_NC.split(batch.grids_I3.prod(-1).tolist())
    logits = policy(
        input_ids=batch.input_ids_BS,
        attention_mask=mask,
        pixel_values=torch.cat([pixels[i] for i in batch.image_of.tolist()]),
        image_grid_thw=batch.grids_I3[batch.image_of],
        mm_token_type_ids=types,
    ).logits
    positions, _ = policy.model.get_rope_index(
        batch.input_ids_BS, types, batch.grids_I3[batch.image_of], attention_mask=mask
    )
    logps = logits.log_softmax(-1)[:, :-1].gather(2, batch.input_ids_BS[:, 1:, None])[..., 0]
    return logps.gather(1, (batch.response_index_BT - 1).clamp_min(0)) * batch.mask_BT, positions * mask


@pytest.fixture
def policy(random_policy):
    return build_policy(PolicySpec(random_policy)).eval()


@pytest.fixture
def processor(random_policy):
    return PolicySpec(random_policy).processor()


@pytest.mark.parametrize("mixed", [False, True], ids=["one image size", "two image sizes"])
@torch.no_grad()
def test_logps_and_positions_equal_transformers(policy, processor, mixed):
    examples = make_examples(3) + (make_examples(2, width=160) if mixed else [])
    batch = encode(processor, examples)
    policy.model.visual.config._attn_implementation_internal = "sdpa"
    reference, positions = stock_logps(policy, processor, batch)
    policy.model.visual.config._attn_implementation_internal = "prism_flash_bounds"
    torch.testing.assert_close(token_logps(policy, batch).logps_BT, reference, atol=1e-5, rtol=0)
    real = torch.arange(batch.input_ids_BS.shape[1])[None] < batch.lengths_B[:, None]
    assert torch.equal(batch.position_ids_3BS * real, positions)


@torch.no_grad()
def test_several_images_and_none(policy, processor):
    two, none = make_examples(2)
    two = replace(two, images=[*two.images, Image.new("RGB", (64, 128), "red")])
    batch = encode(processor, [two, replace(none, images=[])])
    assert batch.images_per_row == [2, 0]
    reference, _ = stock_logps(policy, processor, batch)
    torch.testing.assert_close(token_logps(policy, batch).logps_BT, reference, atol=1e-5, rtol=0)
    text_only = replace(none, images=[])
    without = token_logps(policy, encode(processor, [text_only, text_only])).logps_BT[1]
    torch.testing.assert_close(without, token_logps(policy, batch).logps_BT[1])


@torch.no_grad()
def test_shared_images_equal_repeated_ones(policy, processor):
    examples = make_examples(2)
    shared = encode(processor, examples, prompt_of=[0, 0, 1, 1])
    assert len(shared.grids_I3) == 2
    repeated = encode(processor, [examples[p] for p in (0, 0, 1, 1)])
    assert len(repeated.grids_I3) == 4
    torch.testing.assert_close(token_logps(policy, shared).logps_BT, token_logps(policy, repeated).logps_BT)


@torch.no_grad()
def test_micro_batches_cover_the_batch_and_stay_within_the_budget(policy, processor):
    batch = encode(processor, make_examples(4) + make_examples(3, width=160), prompt_of=[0, 0, 1, 2, 3, 4, 5, 6])
    whole = token_logps(policy, batch).logps_BT
    pieces = list(micro_batches(batch, 300))
    assert len(pieces) > 2
    assert all(piece.input_ids_BS.numel() <= 300 for _, piece in pieces)
    assert sum(piece.input_ids_BS.numel() for _, piece in pieces) < batch.input_ids_BS.numel()
    longest = [int(piece.lengths_B.max()) for _, piece in pieces]
    assert longest == sorted(longest, reverse=True)
    assert batch.groups()[0] == [0, 1]
    order = torch.cat([rows for rows, _ in pieces]).tolist()
    assert abs(order.index(0) - order.index(1)) == 1  # rollouts of one image stay together
    assert [piece.ids for _, piece in pieces] == [[batch.ids[row] for row in rows] for rows, _ in pieces]
    joined = in_order([rows for rows, _ in pieces], [token_logps(policy, piece).logps_BT for _, piece in pieces])
    torch.testing.assert_close(joined, whole, atol=1e-5, rtol=0)
    again = [piece.select(torch.tensor([len(piece) - 1])) for _, piece in pieces]
    rows = torch.stack([rows[-1] for rows, _ in pieces])
    last = torch.cat([token_logps(policy, piece).logps_BT for piece in again])
    torch.testing.assert_close(last, whole[rows], atol=1e-5, rtol=0)
    alone = list(micro_batches(batch, 1))
    assert [len(piece) for _, piece in alone] == [1] * 8


def test_chunked_logps_and_gradients_equal_the_plain_ones():
    head = torch.nn.Linear(8, 50, bias=False)
    hidden = torch.randn(23, 8, requires_grad=True)
    targets = torch.randint(3, 50, (23,))
    results = []
    for chunk in (1000, 5):
        head.zero_grad()
        hidden.grad = None
        logps, entropy = chunked_logps(hidden, head, targets, temperature=0.7, banned_ids=[1, 2], chunk_tokens=chunk)
        logps.square().sum().backward()
        results.append((logps, entropy, hidden.grad.clone(), head.weight.grad.clone()))
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(plain, chunked)
    logits = (head(hidden) / 0.7).index_fill(1, torch.tensor([1, 2]), float("-inf"))
    categorical = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(results[0][0], categorical.log_prob(targets))
    torch.testing.assert_close(results[0][1], categorical.entropy())


def test_no_tensor_of_all_tokens_times_vocabulary_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    head = torch.nn.Linear(8, 500, bias=False)
    hidden = torch.randn(64, 8, requires_grad=True)
    with Sizes():
        chunked_logps(hidden, head, torch.zeros(64, dtype=torch.long), chunk_tokens=4)[0].sum().backward()
    assert max(sizes) < 64 * 500 / 4


def test_gradient_checkpointing_gives_the_same_gradients(random_policy, processor):
    batch = encode(processor, make_examples(2))
    grads = []
    for checkpointing in (False, True):
        policy = build_policy(PolicySpec(random_policy, gradient_checkpointing=checkpointing), ["model.visual.*"])
        token_logps(policy, batch).logps_BT.sum().backward()
        assert policy.model.visual.patch_embed.proj.weight.grad is None
        grads.append(policy.model.language_model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*grads)


def test_export_round_trips_with_its_processor(policy, processor, tmp_path):
    folder = tmp_path / "export"
    save_policy(policy, processor, folder)
    save_policy(policy, processor, folder)  # over an existing one
    again = build_policy(PolicySpec(str(folder)))
    for (name, tensor), (other, copy) in zip(policy.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(tensor, copy)
    source = Path(processor.source)
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).exists()
        if name != "generation_config.json":
            assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_an_export_clears_what_killed_ones_left(policy, processor, tmp_path):
    # Killed while writing: .tmp. Killed after the older export was moved aside and the new one put in place: .old.
    for present in (True, False):
        folder = tmp_path / f"export-{present}"
        if present:
            save_policy(policy, processor, folder)
            (folder / "outdated").touch()
        for leftover in (".tmp", ".old"):
            left = folder.with_name(folder.name + leftover)
            left.mkdir()
            (left / "half").touch()
        save_policy(policy, processor, folder)
        assert not {"half", "outdated"} & {file.name for file in folder.iterdir()}
        assert list(tmp_path.glob("*.tmp")) == list(tmp_path.glob("*.old")) == []
        again = build_policy(PolicySpec(str(folder))).state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in policy.state_dict().items())


class Planted:
    """Writes a file when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (Path.touch, (self.witness,))


def test_a_planted_pickle_is_refused_and_not_opened(blank_policy, tmp_path):
    for file in Path(blank_policy).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    witness = tmp_path / "ran"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(witness)))
    with pytest.raises(ValueError, match="pickled weights") as error:
        build_policy(PolicySpec(str(tmp_path)))
    assert "pytorch_model.bin" in str(error.value)
    assert not witness.exists()


@pytest.mark.parametrize("error", [FileNotFoundError("not cached\nmore"), ConnectionError("offline\nmore")])
def test_a_hub_id_that_cannot_be_read_is_named_with_its_key(monkeypatch, error):
    import huggingface_hub

    def download(path, file):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UsageError) as raised:
        check_policy_path("nowhere/export")
    said = str(error).splitlines()[0]
    assert str(raised.value).startswith(
        f"policy.path 'nowhere/export' is no folder here, and as a hub id it could not be read ({said})"
    )


def test_a_hub_model_of_another_family_is_refused(monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda path, file: str(tmp_path / file))
    with pytest.raises(ValueError, match="'nowhere/export' is a 'llama' model"):
        check_policy_path("nowhere/export")


def test_wrong_paths_are_named(tmp_path, random_policy):
    with pytest.raises(UsageError, match="nowhere"):
        build_policy(PolicySpec(str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"no config\.json"):
        build_policy(PolicySpec(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama' model, not a vision-language model"):
        build_policy(PolicySpec(str(tmp_path)))
    with pytest.raises(ValueError, match="visul"):
        build_policy(PolicySpec(random_policy), ["model.visul.*"])


def test_a_missing_weight_is_an_error_not_a_random_one(random_policy, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in Path(random_policy).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.language_model.layers.0.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*up_proj"):
        build_policy(PolicySpec(str(tmp_path)))


def test_images_that_cannot_be_read_name_the_row(processor, tmp_path):
    example = make_examples(1)[0]
    with pytest.raises(ValueError, match=r"row 'row-0'.*missing\.png"):
        processor.prompt(replace(example, images=[str(tmp_path / "missing.png")]))
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"row 'row-0'.*broken\.png"):
        processor.prompt(replace(example, images=[str(tmp_path / "broken.png")]))
