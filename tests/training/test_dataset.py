"""Data sets of folders: what is read, and one clear line for each thing that can be wrong with a file."""

import json

import numpy as np
import pytest
import torch
from folders import CLASSES, VOID, make_folders
from PIL import Image

from fastseg.io.images import palette
from fastseg.io.processes import Processes
from fastseg.training.batches import collate, plain_errors, scoring_batches, training_batches
from fastseg.training.dataset import DatasetSpec, FolderDataset, read_spec
from fastseg.training.transforms import PADDING, Augment, resized

CPU = Processes(torch.device("cpu"))
SPEC = DatasetSpec(tuple(CLASSES), VOID)


@pytest.fixture
def folder(tmp_path):
    return make_folders(tmp_path / "data")


def test_pairs_in_order_with_the_stored_indices(folder):
    spec = read_spec(folder / "dataset.json")
    assert spec == SPEC and spec.void == VOID
    dataset = FolderDataset(folder, "test", spec)
    dataset.check()
    assert dataset.names == [f"p{i}" for i in range(5)]
    for i, (name, (image, label)) in enumerate(zip(dataset.names, dataset, strict=False)):
        with Image.open(folder / "test" / "labels" / f"{name}.png") as stored:
            np.testing.assert_array_equal(label, np.asarray(stored))
        assert image.shape == (16, 20, 3) and label.dtype == np.uint8
        assert (label == VOID).sum() == 16 * (i % 4)


def test_labels_of_one_bit(folder):
    dataset = FolderDataset(folder, "val", SPEC)
    truth = np.eye(16, 20, dtype=bool)
    Image.fromarray(truth).save(dataset.pairs[0][1], bits=1)
    np.testing.assert_array_equal(dataset.label(0), truth)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no json", "cannot be read as JSON"),
        ("[]", "not an object"),
        ("{}", "classes is None"),
        ('{"classes": []}', "list of names"),
        ('{"classes": ["a"], "ignore": 1}', "'ignore' is not known"),
        ('{"classes": ["a", " "]}', "the class 1 is named ' '"),
        ('{"classes": ["a"], "ignore_index": 256}', "ignore_index is 256"),
        ('{"classes": ["a"], "ignore_index": true}', "ignore_index is True"),
        ('{"classes": ["a"], "palette": [[1, 2]]}', "1 colours"),
        (json.dumps({"classes": ["a"] * 257}), "at most 256"),
    ],
)
def test_bad_description(tmp_path, content, words):
    path = tmp_path / "dataset.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        read_spec(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def _break(kind, folder, dataset):
    image, label = dataset.pairs[1]
    match kind:
        case "label outside":
            Image.fromarray(np.full((16, 20), 2, np.uint8)).save(label)
        case "size":
            Image.fromarray(np.zeros((16, 19), np.uint8)).save(label)
        case "colours":
            Image.new("RGB", (20, 16)).save(label)
        case "no picture":
            image.write_text("text")
        case "no label":
            label.write_bytes(label.read_bytes()[:40])
    return image if kind == "no picture" else label


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("label outside", "has the label 2; classes are 0 to 1, ignore_index is 9"),
        ("size", "the label has 19 x 16 pixels, its picture 20 x 16"),
        ("colours", "mode RGB"),
        ("no picture", "not a PNG or JPEG|cannot be read|cannot identify"),
        ("no label", "cannot be read|not a PNG"),
    ],
)
@pytest.mark.parametrize("workers", [None, 0, 1])
def test_broken_pair_is_one_line_that_names_the_file(folder, kind, words, workers):
    if workers == 1 and kind != "size":
        pytest.skip("one is enough to see what a worker's error looks like")
    dataset = FolderDataset(folder, "val", SPEC)
    path = _break(kind, folder, dataset)
    with pytest.raises(ValueError, match=words) as error:
        if workers is None:
            dataset.check()
        else:
            list(plain_errors(scoring_batches(dataset, None, 1, CPU, workers, pin=False)))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_colours_are_the_specs_then_the_labels_then_ours(folder):
    dataset = FolderDataset(folder, "test", SPEC)
    assert dataset.colours().tolist() == palette(2).tolist()  # the labels' palette is a grey ramp
    colours = [[128, 64, 128], [128, 128, 128]]
    path = dataset.pairs[0][1]
    for own, want in (([*colours, [0, 0, 0]], colours), (colours[:1] * 2, palette(2).tolist())):
        label = Image.open(path)
        label.putpalette([value for colour in own for value in colour])
        label.save(path)
        assert dataset.colours().tolist() == want
    spec = DatasetSpec(SPEC.classes, VOID, ((1, 2, 3), (4, 5, 6)))
    assert FolderDataset(folder, "test", spec).colours().tolist() == [[1, 2, 3], [4, 5, 6]]


def test_picture_cut_short_is_found_when_it_is_read(folder):
    dataset = FolderDataset(folder, "val", SPEC)
    path = dataset.pairs[0][0]
    path.write_bytes(path.read_bytes()[:300])
    dataset.check()
    with pytest.raises(ValueError, match="cannot be read") as error:
        dataset[0]
    assert str(path) in str(error.value)


def test_missing_and_empty(folder):
    with pytest.raises(ValueError, match="no such folder"):
        FolderDataset(folder, "extra", SPEC)
    (folder / "val" / "labels" / "p1.png").unlink()
    with pytest.raises(ValueError, match=r"p1.png: has no label .*p1.png$"):
        FolderDataset(folder, "val", SPEC)
    for path in (folder / "test" / "images").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="'test' is empty"):
        FolderDataset(folder, "test", SPEC)
    Image.new("RGB", (20, 16)).save(folder / "train" / "images" / "p0.jpg")
    with pytest.raises(ValueError, match=r"p0.png: p0.jpg has the same name"):
        FolderDataset(folder, "train", SPEC)


# transforms


def test_picture_and_label_move_together():
    """The label is a function of the picture, and stays so through scale, crop and flip."""
    rows, columns = np.mgrid[:12, :10].astype(np.uint8)
    image = np.stack([20 * rows, 20 * columns, rows * 0], 2)
    seen = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        augment = Augment(crop=(8, 14))
        picture, label = augment(image, rows, rng)
        inside = label != 255
        assert picture.shape == (8, 14, 3) and inside.sum() == 8 * 10
        np.testing.assert_array_equal(picture[inside][:, 0], 20 * label[inside])
        assert (picture[~inside] == PADDING).all()
        start = np.flatnonzero(inside[0])[0]
        seen.add((label[0, start], start, picture[0, start, 1] == 0))
    assert len(seen) > 20 and {flip for *_, flip in seen} == {True, False}
    factors = {Augment(scale=(0.5, 2.0))(image, rows, np.random.default_rng(seed))[1].shape for seed in range(20)}
    assert len(factors) > 10 and min(factors)[0] >= 6 and max(factors)[0] <= 24


def test_resize_keeps_classes():
    label = np.array([[0, 9], [9, 0]], np.uint8)
    image, small = resized(np.zeros((2, 2, 3), np.uint8), label, (4, 6))
    assert image.shape == (4, 6, 3) and set(np.unique(small)) == {0, 9}
    np.testing.assert_array_equal(small, np.kron(label, np.ones((2, 3), np.uint8)))


# batches


def _epoch(folder, epoch, *, rank=0, count=1, workers=0, skip=0, seed=3):
    dataset = FolderDataset(folder, "train", SPEC)
    processes = Processes(torch.device("cpu"), count, rank)
    augment = Augment(scale=(0.8, 1.2), crop=(8, 8), void=VOID)
    loader, sampler = training_batches(dataset, augment, 4, seed, processes, workers, pin=False)
    sampler.set_epoch(epoch)
    sampler.skip = skip
    assert len(loader) == len(list(sampler)) // (4 // count)
    return list(loader)


def test_batches_depend_on_seed_and_epoch_alone(folder):
    first = _epoch(folder, 0)
    same = lambda a, b: all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    assert len(first) == 2 and first[0][0].shape == (4, 8, 8, 3) and first[0][1].dtype == torch.uint8
    assert same(first, _epoch(folder, 0, workers=2))
    assert same(first[1:], _epoch(folder, 0, skip=4))
    assert not same(first, _epoch(folder, 1)) and not same(first, _epoch(folder, 0, seed=4))
    halves = [_epoch(folder, 0, rank=rank, count=2) for rank in range(2)]
    for whole, *parts in zip(first, *halves, strict=True):
        for tensor, *shares in zip(whole, *parts, strict=True):
            together = torch.stack(shares, 1).flatten(0, 1)  # dealt out in turn
            assert torch.equal(tensor, together)


def test_shards_of_a_split_are_all_of_it(folder):
    dataset = FolderDataset(folder, "test", SPEC)
    indices = []
    for rank in range(2):
        loader = scoring_batches(dataset, (8, 10), 2, Processes(torch.device("cpu"), 2, rank), 0, pin=False)
        indices += [index for images, labels, numbers in loader for index in numbers.tolist()]
        assert all(labels.shape[1:] == (8, 10) for _, labels, _ in loader)
    assert sorted(indices) == list(range(5))


def test_batches_that_cannot_be(folder):
    dataset = FolderDataset(folder, "train", SPEC)
    with pytest.raises(ValueError, match="3 processes cannot share"):
        training_batches(dataset, Augment(), 4, 0, Processes(torch.device("cpu"), 3), 0, pin=False)
    with pytest.raises(ValueError, match="--batch is 9, and the split 'train' has 8"):
        training_batches(dataset, Augment(), 9, 0, CPU, 0, pin=False)
    samples = [(np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8))]
    with pytest.raises(ValueError, match="5 x 4 and 5 x 6 pixels"):
        collate([*samples, (np.zeros((6, 5, 3), np.uint8), np.zeros((6, 5), np.uint8))])
