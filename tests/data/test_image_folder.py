from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch import Tensor

from landscape import streams
from landscape.data import image_files, image_views
from landscape.data.image_check import LIST_NAME
from landscape.data.image_files import UnreadableImageError, class_folders, find_images, read_image
from landscape.data.image_folder import IMAGENET_MEAN, IMAGENET_STD, ImageFolderData, check_images, image_folder
from landscape.data.image_views import ViewReader, crop_box, evaluation_view, random_view
from landscape.optional import import_torchvision

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="needs torchvision; not installed"
)
SIZE = 16
CLASSES = ("n01", "n02", "n03")


def picture(seed: int, width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """Smooth random colours, so that JPEG keeps them apart."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    bands = [Image.fromarray(coarse[:, :, c]).resize((width, height)) for c in range(channels)]
    return Image.merge(mode, bands)


def write(path: Path, seed: int, width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, width, height).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes; four training and two held-out images each, high, wide and square."""
    shapes = [(40, 30), (30, 45), (24, 24), (64, 20)]
    for part, count in (("train", 4), ("val", 2)):
        for c, name in enumerate(CLASSES):
            for i in range(count):
                write(tmp_path / "set" / part / name / f"{part}_{i}.JPEG", 100 * len(part) + 10 * c + i, *shapes[i])
    return tmp_path / "set"


@pytest.fixture
def train(root: Path) -> ImageFolderData:
    return image_folder(root, size=SIZE)[0]


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(streams.uniform(streams.philox("test views", seed), *shape, 5))


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded from now on."""
    read: list[str] = []

    def counting(path: str) -> Any:
        read.append(path)
        return read_image(path)

    monkeypatch.setattr(image_views, "read_image", counting)
    return read


def normalised(image: Image.Image) -> Tensor:
    F = import_torchvision("torchvision.transforms.functional")
    return F.normalize(F.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


# What is read


@needs_torchvision
def test_files_and_order_are_those_of_torchvisions_image_folder(root: Path) -> None:
    write(root / "train" / "n02" / "more" / "deep" / "a.png", 1)
    write(root / "train" / "n02" / "less" / "z.webp", 2)
    write(root / "train" / "n02" / "Capital.JPG", 3)
    (root / "train" / "n02" / "link.jpg").symlink_to(root / "train" / "n01" / "train_0.JPEG")
    (root / "train" / "n01" / "linked").symlink_to(root / "val" / "n01")
    (root / "train" / "n01" / "notes.txt").write_text("no image")
    (root / "train" / "readme.JPEG").write_text("passed over, as it is of no class")
    theirs = import_torchvision("torchvision.datasets").ImageFolder(str(root / "train"))
    ours = image_folder(root)[0].files
    assert [(ours.path(i), int(t)) for i, t in enumerate(ours.targets)] == theirs.samples
    assert list(ours.classes) == theirs.classes
    assert ours.sizes.tolist() == [os.path.getsize(path) for path, _ in theirs.samples]


@needs_torchvision
@pytest.mark.parametrize("size", [1, 15, 16, 64])
def test_batches_are_torchvisions_resize_and_centre_crop_exactly(root: Path, size: int) -> None:
    T = import_torchvision("torchvision.transforms")
    view = T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size)])
    train, val = image_folder(root, size=size)
    for data in (train, val):
        expected = torch.stack([normalised(view(Image.open(data.files.path(i)))) for i in range(len(data))])
        indices = torch.tensor([[3, 0], [5, 3]])
        inputs, targets = data.batch(indices)
        assert torch.equal(inputs, expected[indices])
        assert torch.equal(targets, data.files.targets[indices])
        assert torch.equal(data.targets_at(indices), targets)
        assert torch.equal(data.rows(slice(2, 5))[0], expected[2:5])
        assert torch.equal(data.rows(slice(2, 5))[0], expected[2:5])  # kept in memory


@needs_torchvision
@pytest.mark.parametrize("size", [1, 16, 40])
def test_draws_are_torchvisions_resized_crops_and_flips_exactly(root: Path, size: int) -> None:
    F = import_torchvision("torchvision.transforms.functional")
    data, indices, u = image_folder(root, size=size)[0], torch.arange(12).view(2, 6), uniforms(2, 6)
    u[0, 0], u[0, 1], u[1, 5] = 0, 1 - 2**-53, torch.tensor([1 - 2**-53, 0, 0, 0, 0.5])
    drawn, targets = data.draw(indices, u)
    for place in np.ndindex(2, 6):
        image = Image.open(data.files.path(int(indices[place])))
        left, top, across, down = crop_box(*image.size, u[place].tolist())
        expected = F.resized_crop(image, top, left, down, across, [size, size])
        expected = F.hflip(expected) if u[place][4] < 0.5 else expected
        assert torch.equal(drawn[place], normalised(expected))
    assert torch.equal(targets, data.files.targets[indices])


def test_held_out_images_are_not_augmented(root: Path) -> None:
    train, val = image_folder(root, size=SIZE)
    assert (train.num_random, val.num_random) == (5, 0)
    assert (train.reads_ahead, val.reads_ahead) == (True, True)
    indices = torch.tensor([1, 4])
    none = torch.empty(2, 0, dtype=torch.float64)
    val.expect(indices, none)
    assert torch.equal(val.draw(indices, none)[0], val.batch(indices)[0])
    assert not torch.equal(train.draw(indices, uniforms(2))[0], train.batch(indices)[0])


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "LA", "I;16", "animated", "rotated"])
def test_images_of_every_kind_become_rgb(tmp_path: Path, mode: str) -> None:
    image = picture(3)
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "rotated") else "a.png")
    expected = image
    if mode == "animated":
        path = tmp_path / "a.webp"
        image.save(path, save_all=True, append_images=[picture(4)], lossless=True)
    elif mode == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
        expected = Image.open(path)
    elif mode == "I;16":
        Image.fromarray(np.full((30, 40), 300, np.uint16)).save(path)
        expected = Image.new("RGB", (40, 30), (255, 255, 255))  # as PIL, and so torchvision, converts it
    else:
        stored = picture(3, mode=mode) if mode in ("CMYK", "RGBA", "LA") else image.convert(mode)
        stored.save(path)
        expected = Image.open(path).convert("RGB")
    found = read_image(str(path))
    assert (found.mode, found.size) == ("RGB", (40, 30))
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_views_of_any_shape_of_image(tmp_path: Path) -> None:
    for width, height in ((1, 1), (1, 50), (50, 1), (3, 2), (500, 8)):
        image = picture(0, width, height)
        assert evaluation_view(image, SIZE).size == (SIZE, SIZE)
        for u in uniforms(20):
            assert random_view(image, SIZE, u.tolist()).size == (SIZE, SIZE)


# Random crops


unit = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 5000), st.integers(1, 5000), st.tuples(unit, unit, unit, unit, unit))
def test_crops_lie_in_the_image(width: int, height: int, u: tuple[float, ...]) -> None:
    left, top, across, down = crop_box(width, height, u)
    assert 1 <= across <= width - left
    assert 1 <= down <= height - top
    assert min(left, top) >= 0
    assert across * down <= width * height


def test_area_ratio_and_place_are_as_promised() -> None:
    side = 10_000
    for share, place in ((0.0, 0.0), (0.3, 0.7)):
        for ratio in (0.0, 0.5, 1 - 2**-53):
            left, top, across, down = crop_box(side, side, (share, ratio, place, 1 - place, 0))
            assert across * down / side**2 == pytest.approx(0.08 + 0.92 * share, rel=1e-3)
            assert math.log(across / down) == pytest.approx((2 * ratio - 1) * math.log(4 / 3), abs=1e-3)
            assert (top, left) == (int(place * (side - down + 1)), int((1 - place) * (side - across + 1)))


def chi_squared(values: np.ndarray, bins: int) -> float:
    """Standard errors from uniform: chi2 has mean bins - 1 and variance 2 (bins - 1)."""
    counts = np.bincount((values * bins).astype(int), minlength=bins)
    chi2 = ((counts - len(values) / bins) ** 2).sum() / (len(values) / bins)
    return (chi2 - (bins - 1)) / math.sqrt(2 * (bins - 1))


def test_crops_are_uniform_in_area_ratio_and_place() -> None:
    side, u = 10_000, uniforms(20_000, seed=1).numpy()
    boxes = np.array([crop_box(side, side, row) for row in u.tolist()])
    left, top, across, down = boxes.T
    whole = (across < side) & (down < side)
    assert 0.85 < whole.mean() < 0.87  # 14 % are cut
    small = across * down < 0.7 * side**2  # none of these is cut: the widest is 0.7^0.5 (4/3)^0.5 = 0.97 of the side
    area = (across[small] * down[small] / side**2 - 0.08) / (0.7 - 0.08)
    ratio = (np.log(across[small] / down[small]) / math.log(4 / 3) + 1) / 2
    places = [left[small] / (side - across[small] + 1), top[small] / (side - down[small] + 1)]
    for values in (area, ratio, *places):
        assert abs(chi_squared(np.clip(values, 0, 1 - 1e-9), 20)) < 4
    joint = np.floor(places[0] * 5) * 5 + np.floor(places[1] * 5)
    assert abs(chi_squared((joint + 0.5) / 25, 25)) < 4


@needs_torchvision
def test_crops_of_images_that_hold_them_are_distributed_as_torchvisions() -> None:
    """Mean area and ratio of the crops of at most 0.7 of a square, which neither cuts or refuses."""
    params = import_torchvision("torchvision.transforms").RandomResizedCrop.get_params
    side, count = 1000, 2000
    image = Image.new("1", (side, side))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([params(image, [0.08, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(count)], float)
    ours = np.array([crop_box(side, side, row)[:1:-1] for row in uniforms(count, seed=2).tolist()], float)
    for value in (lambda b: b[:, 0] * b[:, 1] / side**2, lambda b: np.log(b[:, 1] / b[:, 0])):
        a, b = (value(boxes[boxes.prod(1) < 0.7 * side**2]) for boxes in (theirs, ours))
        assert abs(a.mean() - b.mean()) < 4 * math.sqrt(a.var() / len(a) + b.var() / len(b))


# Determinism, reading ahead, memory


def test_stacked_split_expected_and_threaded_draws_are_equal(train: ImageFolderData) -> None:
    indices, u = torch.randint(0, 12, (3, 8), generator=torch.Generator().manual_seed(0)), uniforms(3, 8)
    stacked, targets = train.draw(indices, u)
    train.expect(indices, u)
    assert torch.equal(train.draw(indices.clone(), u.clone())[0], stacked)
    assert torch.equal(torch.stack([train.draw(i, v)[0] for i, v in zip(indices, u, strict=True)]), stacked)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            threaded = list(pool.map(train.draw, [*indices] * 2, [*u] * 2))
            assert torch.equal(torch.stack([inputs for inputs, _ in threaded[:3]]), stacked)
            assert torch.equal(torch.stack([t for _, t in threaded[3:]]), targets)


def test_one_thread_and_many_read_the_same(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    indices, u, found = torch.arange(12), uniforms(12), []
    for threads in (1, 7):
        monkeypatch.setattr(image_views, "num_threads", lambda threads=threads: threads)
        data = image_folder(root, size=SIZE)[0]
        found.append(torch.stack([data.draw(indices, u)[0], data.batch(indices)[0]]))
        data.close()
    assert torch.equal(found[0], found[1])


def test_what_is_expected_is_decoded_once_and_taken_by_the_draw(
    monkeypatch: pytest.MonkeyPatch, train: ImageFolderData
) -> None:
    read, u = count_reads(monkeypatch), uniforms(2, 4)
    now, later = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7])
    train.expect(later, u[1])
    train.rows(slice(8, 10))  # a measure in between
    assert torch.equal(train.draw(now, u[0])[0], train.draw(now, u[0])[0])
    drawn = train.draw(later, u[1])[0]
    assert len(read) == 4 + 2 + 8
    assert torch.equal(train.draw(later, u[1])[0], drawn)
    assert len(read) == 4 + 2 + 8 + 4


@pytest.mark.parametrize("other", ["indices", "uniforms", "shape"])
def test_a_wrong_expectation_changes_nothing(train: ImageFolderData, other: str) -> None:
    indices, u = torch.tensor([0, 5, 7]), uniforms(3)
    plain = train.draw(indices, u)
    if other == "shape":
        train.expect(indices[:2], u[:2])
    else:
        train.expect(indices.flip(0) if other == "indices" else indices, u.flip(0) if other == "uniforms" else u)
    drawn = train.draw(indices, u)
    assert torch.equal(drawn[0], plain[0])
    assert torch.equal(drawn[1], plain[1])


def test_one_minibatch_is_expected_at_most(train: ImageFolderData) -> None:
    u = uniforms(4)
    train.expect(torch.tensor([0, 1, 2, 3]), u)
    before = train.reader._expected
    train.expect(torch.tensor([4, 5, 6, 7]), u)
    assert before is not None
    assert all(job.cancelled() or job.done() or job.running() for job in before.jobs)
    assert train.reader._expected is not before
    train.draw(torch.tensor([4, 5, 6, 7]), u)
    assert train.reader._expected is None


def test_evaluation_views_are_kept_up_to_the_budget_and_shared_by_copies(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    read = count_reads(monkeypatch)
    data = image_folder(root, size=SIZE, cache_bytes=5 * 3 * SIZE**2 + 100)[0]
    indices = torch.arange(12)
    first = data.batch(indices)[0]
    assert len(read) == 12
    assert data.reader.bytes_kept == 5 * 3 * SIZE**2
    again = data.to("cpu", torch.float64).batch(indices)[0]
    assert len(read) == 12 + 7
    torch.testing.assert_close(first.double(), again, rtol=1e-6, atol=1e-6)
    data.draw(indices, uniforms(12))
    assert data.reader.bytes_kept == 5 * 3 * SIZE**2
    none = image_folder(root, size=SIZE, cache_bytes=0)[0]
    assert torch.equal(none.batch(indices)[0], none.batch(indices)[0])
    assert none.reader.bytes_kept == 0


def test_what_is_kept_is_not_what_was_given_away(train: ImageFolderData) -> None:
    plain = train.reader.read([0, 1], None).clone()
    train.reader.read([0, 1], None).fill_(0)
    assert torch.equal(train.reader.read([0, 1], None), plain)


@pytest.mark.parametrize("copied", [lambda d: pickle.loads(pickle.dumps(d)), copy.deepcopy])
def test_copies_read_the_same(train: ImageFolderData, copied: Callable[[ImageFolderData], ImageFolderData]) -> None:
    indices, u = torch.tensor([[0, 5], [7, 7]]), uniforms(2, 2)
    train.expect(indices, u)
    other = copied(train)
    for a, b in ((train.draw(indices, u), other.draw(indices, u)), (train.batch(indices), other.batch(indices))):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert other.fingerprint() == train.fingerprint()


def test_reading_goes_on_after_close_and_after_a_fork(train: ImageFolderData) -> None:
    indices, u = torch.tensor([0, 5]), uniforms(2)
    plain = train.draw(indices, u)[0]
    train.expect(indices, u)
    train.close()
    assert train.reader._pool is None
    assert torch.equal(train.draw(indices, u)[0], plain)
    train.close()
    train.close()
    train.expect(indices, u)
    train.reader._process = -1  # as a forked process finds it
    assert torch.equal(train.draw(indices, u)[0], plain)


def test_inputs_have_the_type_and_images_the_size_asked_for(root: Path) -> None:
    data = image_folder(root)[1]
    assert data.batch(torch.tensor([0]))[0].shape == (1, 3, 224, 224)
    double = replace(data, name="other").to("cpu", torch.float64)
    assert (double.dtype, double.device, double.batch(torch.tensor([0]))[0].dtype) == (
        torch.float64, torch.device("cpu"), torch.float64,
    )  # fmt: skip
    assert double.to("cpu").dtype == torch.float64


def test_the_fingerprint_is_of_names_sizes_and_classes(root: Path, tmp_path: Path) -> None:
    def prints(where: Path, size: int = SIZE) -> tuple[str, str]:
        train, val = image_folder(where, size=size)
        return train.fingerprint(), val.fingerprint()

    first = prints(root)
    assert len(set(first)) == 2
    shutil.copytree(root, tmp_path / "elsewhere")
    assert prints(tmp_path / "elsewhere") == first
    assert prints(root, 32)[0] != first[0]
    seen = {first[0]}
    path = root / "train" / "n01" / "train_0.JPEG"
    path.write_bytes(path.read_bytes() + b"\0")
    seen.add(prints(root)[0])
    path.rename(path.with_name("train_00.JPEG"))
    seen.add(prints(root)[0])
    for part in ("train", "val"):
        (root / part / "n01").rename(root / part / "n00")
    seen.add(prints(root)[0])
    (root / "train" / "n00" / "train_00.JPEG").rename(root / "train" / "n02" / "train_00.JPEG")
    seen.add(prints(root)[0])
    assert len(seen) == 5


@pytest.mark.parametrize(("processes", "expected"), [("1", 4), ("3", 1), ("8", 1)])
def test_the_processes_of_torchrun_share_the_processors(
    monkeypatch: pytest.MonkeyPatch, processes: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert image_files.num_threads() == expected


# What is wrong


def no_train(root: Path) -> None:
    shutil.rmtree(root / "train")


def no_val(root: Path) -> None:
    (root / "val").rename(root / "validation")


def nothing(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def no_root(root: Path) -> None:
    shutil.rmtree(root)


def flat_val(root: Path) -> None:
    shutil.rmtree(root / "val")
    write(root / "val" / "ILSVRC2012_val_00000001.JPEG", 0)


def file_for_folder(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").touch()


def empty_class(root: Path) -> None:
    for part in ("train", "val"):
        (root / part / "n00").mkdir()


def other_classes(root: Path) -> None:
    (root / "val" / "n03").rename(root / "val" / "n04")


def empty_file(root: Path) -> None:
    (root / "train" / "n02" / "train_1.JPEG").write_bytes(b"")


def broken_link(root: Path) -> None:
    (root / "train" / "n02" / "gone.JPEG").symlink_to(root / "nowhere.JPEG")


def circle(root: Path) -> None:
    (root / "train" / "n02" / "inner").mkdir()
    (root / "train" / "n02" / "inner" / "round").symlink_to(root / "train" / "n02")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_train, r"must hold the folders train and val.*missing: train; there is: val"),
        (no_val, r"missing: val; there is: train, validation"),
        (nothing, r"missing: train, val; there is: nothing"),
        (no_root, r"set cannot be read: No such file"),
        (flat_val, r"val holds no class folders.*1 image files directly: sort them .*ImageNet's validation archive"),
        (file_for_folder, r"missing: val; there is: train, val"),
        (empty_class, r"train: no image in 1 of 4 class folders \(n00\); complete the data, or remove"),
        (other_classes, r"same class folders; only in train: n03 \(1\); only in val: n04 \(1\)"),
        (
            empty_file,
            r"train: 1 image files are empty, 0 bytes \(n02/train_1\.JPEG\); find all such files with: python -c",
        ),
        (broken_link, r"gone\.JPEG is no file, or a link that leads nowhere"),
        (circle, r"inner/round is a link to a folder that it lies in"),
    ],
)
def test_incomplete_data_are_told(root: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(root)
    with pytest.raises(ValueError, match=message):
        image_folder(root, size=SIZE)


def test_a_wrong_number_of_classes_is_told(root: Path) -> None:
    assert len(image_folder(root, num_classes=3)) == 2
    with pytest.raises(
        ValueError, match=r"1,000 classes are expected, and there are 3 class folders \(n01, n02, n03\)"
    ):
        image_folder(root, num_classes=1000)


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_without_pixels_is_told(root: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"a side of at least 1 pixel, not {size}"):
        image_folder(root, size=size)


def test_a_policy_that_there_is_not_is_told(root: Path) -> None:
    with pytest.raises(ValueError, match=r'corrupt must be "refuse" or "skip", not \'ignore\''):
        image_folder(root, corrupt="ignore")


def test_a_folder_that_may_not_be_read_is_told(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("n02"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(ValueError, match=r"train/n02 cannot be read: Permission denied"):
        image_folder(root)


def test_a_file_that_may_not_be_read_is_told(monkeypatch: pytest.MonkeyPatch, train: ImageFolderData) -> None:
    def refused(path: str, _: str) -> Any:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(image_files, "open", refused, raising=False)
    with pytest.raises(ValueError, match=r"n01/train_0\.JPEG cannot be read as an image: Permission denied; find all"):
        train.batch(torch.tensor([0]))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, r"image file is truncated"),
    "headers only": (lambda p: p.write_bytes(p.read_bytes()[:30]), "its contents are of no image format|Truncated"),
    "empty": (lambda p: p.write_bytes(b""), "it is empty, 0 bytes"),
    "text": (lambda p: p.write_text("not an image " * 20), "its contents are of no image format"),
    "zeros": (lambda p: p.write_bytes(bytes(1000)), "its contents are of no image format"),
    "gone": (lambda p: p.unlink(), "No such file or directory"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_image_is_named_when_it_is_decoded(train: ImageFolderData, damage: str) -> None:
    spoil, reason = DAMAGES[damage]
    spoil(Path(train.files.path(6)))
    message = rf"n02/train_2\.JPEG cannot be read as an image: .*({reason}).*; find all such files with: python -c"
    for read in (lambda: train.batch(torch.tensor([0, 6])), lambda: train.draw(torch.tensor([6, 1]), uniforms(2))):
        with pytest.raises(ValueError, match=message):
            read()
    train.expect(torch.tensor([6, 1]), uniforms(2))  # is told when it is drawn, not before
    with pytest.raises(ValueError, match=message):
        train.draw(torch.tensor([6, 1]), uniforms(2))
    assert train.draw(torch.tensor([0, 1]), uniforms(2))[0].shape == (2, 3, SIZE, SIZE)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL's, of TIFF's tags
@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tif", "ppm"])
def test_truncated_files_of_other_formats_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    image.save(path)
    whole = path.read_bytes()
    for kept in (0, 1, 10, 40, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(UnreadableImageError, match="cannot be read as an image"):
            read_image(str(path))


def test_a_header_that_claims_a_huge_image_is_told(monkeypatch: pytest.MonkeyPatch, train: ImageFolderData) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"train_0\.JPEG cannot be read as an image: Image size .* exceeds limit"):
        train.batch(torch.tensor([0]))


def test_images_are_not_filled_with_grey_where_some_module_allowed_it(
    monkeypatch: pytest.MonkeyPatch, train: ImageFolderData
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is set"):
        train.batch(torch.tensor([0]))
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is set"):
        check_images(Path(train.files.folder).parent)


@pytest.mark.parametrize("index", [-1, 12])
def test_examples_that_there_are_not_are_refused(train: ImageFolderData, index: int) -> None:
    with pytest.raises(IndexError):
        train.batch(torch.tensor([0, index]))


def test_uniforms_of_another_shape_are_refused(train: ImageFolderData) -> None:
    with pytest.raises(ValueError, match=r"5 uniforms an example make a shape of \(2, 5\), not \(2, 3\)"):
        train.draw(torch.tensor([0, 1]), torch.zeros(2, 3, dtype=torch.float64))


# Checks, and data with unreadable files


def spoil_three(root: Path) -> list[str]:
    names = ["train/n01/train_3.JPEG", "train/n03/train_0.JPEG", "val/n02/val_1.JPEG"]
    truncate(root / names[0])
    (root / names[1]).write_bytes(b"")
    (root / names[2]).write_text("text")
    return names


def test_a_check_counts_and_names_what_cannot_be_read(root: Path) -> None:
    whole = check_images(root, quiet=True)
    assert (whole.num_files, dict(whole.unreadable)) == (18, {})
    assert str(whole) == f"{root}: 18 image files read, 0 cannot be; see {root / LIST_NAME}"
    names = spoil_three(root)
    found = check_images(root, quiet=True)
    assert list(found.unreadable) == names
    assert found.unreadable[names[1]] == "it is empty, 0 bytes"
    assert "truncated" in found.unreadable[names[0]]
    assert "18 image files read, 3 cannot be" in str(found)
    assert f"  {names[2]}: its contents are of no image format" in str(found)
    assert json.loads((root / LIST_NAME).read_text()) == {"num_files": 18, "unreadable": dict(found.unreadable)}
    assert sorted(p.name for p in root.iterdir()) == ["train", LIST_NAME, "val"]


def test_a_list_that_cannot_be_written_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr("landscape.data.image_check.read_image", lambda _: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"cannot be written to .*name another place with list_file="):
        check_images(root, list_file=root / "nowhere" / "list.json")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_skipped_files_are_left_out_from_the_start_with_a_warning(root: Path, tmp_path: Path, elsewhere: bool) -> None:
    plain = image_folder(root, size=SIZE)[0]
    spoil_three(root)
    list_file = tmp_path / "list.json" if elsewhere else None
    check_images(root, list_file=list_file, quiet=True)
    with pytest.warns(UserWarning, match="images are left out") as caught:
        train, val = image_folder(root, size=SIZE, corrupt="skip", list_file=list_file)
    first, second = (str(w.message) for w in caught)
    assert "train: 2 of 12 images are left out, unreadable by" in first
    assert first.endswith("n01/train_3.JPEG, n03/train_0.JPEG; delete the list once they are repaired")
    assert "val: 1 of 6 images are left out" in second
    assert (len(train), len(val)) == (10, 5)
    assert train.files.targets.tolist() == [0] * 3 + [1] * 4 + [2] * 3
    assert val.files.targets.tolist() == [0, 0, 1, 2, 2]
    everything = train.rows(slice(None))[0]
    kept = [i for i in range(12) if i not in (3, 8)]
    assert torch.equal(everything, plain.batch(torch.tensor(kept))[0])
    assert train.fingerprint() != plain.fingerprint()


def test_a_file_spoilt_after_the_check_is_an_error_still(root: Path) -> None:
    check_images(root, quiet=True)
    train = image_folder(root, size=SIZE, corrupt="skip")[0]
    truncate(Path(train.files.path(2)))
    with pytest.raises(ValueError, match=r"train_2\.JPEG cannot be read as an image"):
        train.batch(torch.tensor([2]))
    Path(train.files.path(1)).write_bytes(b"")
    with pytest.raises(ValueError, match="1 image files are empty"):
        image_folder(root, size=SIZE, corrupt="skip")


def test_skipping_needs_a_check(root: Path) -> None:
    with pytest.raises(ValueError, match=r'unreadable-images\.json is missing: corrupt="skip" needs a check'):
        image_folder(root, corrupt="skip")


@pytest.mark.parametrize("content", ["", "[]", "{}", "[1", '{"unreadable": 3}', "\xff"])
def test_a_damaged_list_is_told(root: Path, content: str) -> None:
    (root / LIST_NAME).write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match="cannot be read as the list of a check"):
        image_folder(root, corrupt="skip")


def test_a_class_of_unreadable_images_only_is_told(root: Path) -> None:
    names = [f"val/n02/val_{i}.JPEG" for i in range(2)]
    (root / LIST_NAME).write_text(json.dumps({"unreadable": names}))
    with pytest.raises(ValueError, match="val: no image of n02 is left without the unreadable ones"):
        image_folder(root, corrupt="skip")


# Real data


@pytest.mark.data
@needs_torchvision
def test_imagenette_is_read() -> None:
    root = Path(os.environ["LANDSCAPE_DATA_ROOT"]) / "imagenette"
    train, val = image_folder(root, num_classes=10, size=64)
    assert [len(train), len(val)] == [2000, 500]
    assert torch.bincount(train.targets_at(torch.arange(2000))).min() > 0
    theirs = import_torchvision("torchvision.datasets").ImageFolder(str(root / "val"))
    assert [val.files.path(i) for i in range(500)] == [path for path, _ in theirs.samples]
    inputs, _ = val.batch(torch.arange(0, 500, 25))
    assert inputs.shape == (20, 3, 64, 64)
    for channel in inputs.transpose(0, 1):
        assert abs(float(channel.mean())) < 0.5
        assert 0.8 < float(channel.std()) < 1.5


@pytest.mark.gpu
def test_views_on_a_gpu_are_those_on_the_cpu(train: ImageFolderData) -> None:
    indices, u = torch.tensor([[0, 5], [7, 11]]), uniforms(2, 2)
    there = train.to("cuda")
    there.expect(indices, u)
    drawn, targets = there.draw(indices, u)
    assert drawn.is_cuda
    assert targets.is_cuda
    torch.testing.assert_close(drawn.cpu(), train.draw(indices, u)[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(there.batch(indices)[0].cpu(), train.batch(indices)[0], rtol=1e-6, atol=1e-6)


def test_the_reader_alone_can_be_closed_unused(train: ImageFolderData) -> None:
    reader = ViewReader(find_images(train.files.folder, class_folders(train.files.folder)), SIZE, 0)
    reader.close()
    assert reader.bytes_kept == 0
