"""Batches for training and scoring, the same for any number of workers and processes, and after a resume.

The order of an epoch depends on the seed and the epoch. The augmentation of a picture depends on the seed, the epoch
and the picture. No generator has a state that a checkpoint would have to hold.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fastseg.io.processes import Processes
from fastseg.training.dataset import Pairs
from fastseg.training.signals import obey_parent_alone
from fastseg.training.transforms import Augment, resized


class EpochSampler(DistributedSampler):
    """As torch's ``DistributedSampler``; differences: indices come with their epoch, and no epoch is padded.
        It deals the shuffled indices out to the processes in turn. Indices that do not fill a round are left out, and
        the first samples of an epoch can be skipped.

    Args:
        count: number of pictures.
        seed: of the random order.
        processes: that share the pictures.
    """

    def __init__(self, count: int, seed: int, processes: Processes):
        super().__init__(
            range(count), num_replicas=processes.count, rank=processes.rank, shuffle=True, seed=seed, drop_last=True
        )
        self.skip = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, index) for index in list(super().__iter__())[self.skip :]])

    def __len__(self) -> int:
        return super().__len__() - self.skip


class Augmented(Dataset):
    """``dataset`` with ``augment`` applied; an item is indexed by epoch and picture."""

    def __init__(self, dataset: Pairs, augment: Augment, seed: int):
        self.dataset, self.augment, self.seed = dataset, augment, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        image, label = self.dataset[key[1]]
        return self.augment(image, label, np.random.default_rng([self.seed, *key]))


class Shard(Dataset):
    """Every ``processes.count``-th picture, with its index; nothing is padded, so shards differ in length."""

    def __init__(self, dataset: Pairs, size: tuple[int, int] | None, processes: Processes):
        self.dataset, self.size = dataset, size
        self.indices = range(processes.rank, len(dataset), processes.count)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray, int]:
        index = self.indices[position]
        image, label = self.dataset[index]
        return *(resized(image, label, self.size) if self.size else (image, label)), index


def collate(samples: Sequence[tuple]) -> tuple[Tensor, ...]:
    """Pictures (N, H, W, 3) uint8, labels (N, H, W) uint8, and indices if there are any.

    Raises:
        ValueError: the sizes differ.
    """
    sizes = sorted({sample[1].shape for sample in samples})
    if len(sizes) > 1:
        raise ValueError(
            f"a batch of pictures of {sizes[0][1]} x {sizes[0][0]} and {sizes[-1][1]} x {sizes[-1][0]} pixels; give "
            "them one size with --crop or --size, or score them one by one"
        )
    images, labels, *indices = zip(*samples, strict=True)
    tensors = torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))
    return *tensors, *(torch.tensor(column) for column in indices)


def training_batches(
    dataset: Pairs, augment: Augment, batch: int, seed: int, processes: Processes, workers: int, pin: bool
) -> tuple[DataLoader, EpochSampler]:
    """The loader of this process's share of each batch, and its sampler.

    Raises:
        ValueError: the batch does not divide among the processes, or is larger than the data set.
    """
    if batch % processes.count:
        raise ValueError(f"--batch is {batch}, which {processes.count} processes cannot share evenly")
    if len(dataset) < batch:
        raise ValueError(f"--batch is {batch}, and the split {dataset.split!r} has {len(dataset)} pictures")
    sampler = EpochSampler(len(dataset), seed, processes)
    loader = DataLoader(
        Augmented(dataset, augment, seed),
        batch // processes.count,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=True,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=obey_parent_alone,
    )
    return loader, sampler


def scoring_batches(
    dataset: Pairs, size: tuple[int, int] | None, batch: int, processes: Processes, workers: int, pin: bool
) -> DataLoader:
    """The loader of this process's share of a split, in order, with indices."""
    shard = Shard(dataset, size, processes)
    return DataLoader(
        shard, batch, num_workers=workers, collate_fn=collate, pin_memory=pin, worker_init_fn=obey_parent_alone
    )


def plain_errors(loader: DataLoader) -> Iterator:
    """Iterate over the batches; an error of a worker keeps its message and drops the worker's traceback."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except ValueError as error:
            *trace, line = str(error).strip().splitlines()
            raise ValueError(line.partition(": ")[2] if trace else line) from None
        yield batch
