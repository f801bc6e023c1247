"""The smallest datamodule over a file: rows of a CSV table with images beside it."""

import csv
from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from prism_pl.batch import Example


class TableData(LightningDataModule):
    """Columns image and question, and where the table has them response and answer."""

    def __init__(self, file: str, batch_size: int = 2):
        super().__init__()
        self.file, self.batch_size = Path(file), batch_size

    def train_dataloader(self):
        with self.file.open() as stream:
            rows = list(csv.DictReader(stream))
        examples = [
            Example(
                id=f"{self.file.name}:{number}",
                question=row["question"],
                images=[self.file.parent / row["image"]],
                response=row.get("response"),
                answers=[row["answer"]] if "answer" in row else [],
                system="",
            )
            for number, row in enumerate(rows, start=2)
        ]
        return DataLoader(examples, batch_size=self.batch_size, collate_fn=self.trainer.lightning_module.collator)
