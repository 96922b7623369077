"""Trees of image files: what is read, with and without an index, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from reader_helpers import CONF, real_dataset

from hybridfl.build import build
from hybridfl.data.image_folder import ImageFolder
from hybridfl.errors import ConfigError, DataError

# Image folders


def encoded(value: int | tuple[int, int, int], size: tuple[int, int] = (4, 4), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L" if isinstance(value, int) else "RGB", size, value).save(stream, kind)
    return stream.getvalue()


def write_tree(top: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(content)


def zip_first_level(top: Path) -> None:
    for folder in [path for path in top.iterdir() if path.is_dir()]:
        with zipfile.ZipFile(f"{folder}.zip", "w") as archive:
            for path in sorted(folder.rglob("*"), reverse=True):
                archive.write(path, path.relative_to(folder).as_posix())
        shutil.rmtree(folder)


def domain_tree(top: Path) -> None:
    """Two domains of five cats and five dogs; red tells the domain, green the class, blue the image."""
    for red, domain in enumerate(("paint", "photo")):
        for green, kind in enumerate(("cat", "dog")):
            images = {f"{domain}/{kind}/{blue}.png": encoded((red, green, blue)) for blue in range(5)}
            write_tree(top, images)


def write_index(top: Path, rows: list[str], header: str = "domain,class,label,file,split") -> None:
    (top / "index.csv").write_text("\n".join([header, *rows]) + "\n")


def colours(x: np.ndarray) -> list[list[int]]:
    assert np.array_equal(x, np.broadcast_to(x[:, :, :1, :1], x.shape)), "one colour an image"
    return x[:, :, 0, 0].tolist()


DOMAINS = ImageFolder("pics", "domain", size=None)
"""Of the tree above."""


@pytest.mark.parametrize("pack", [False, True], ids=["folders", "zips"])
def test_a_tree_of_domains_without_an_index_holds_out_of_every_class(tmp_path: Path, pack: bool) -> None:
    domain_tree(tmp_path / "pics")
    write_tree(tmp_path / "pics", {"paint/cat/notes.txt": b"", "paint/cat/.hidden.png": b"", "readme.md": b""})
    if pack:
        zip_first_level(tmp_path / "pics")
    found = DOMAINS.load(tmp_path)
    assert (found.name, found.classes, found.train.x.dtype) == ("pics", 2, np.uint8)
    assert colours(found.train.x) == [[red, green, blue] for red in (0, 1) for green in (0, 1) for blue in range(4)]
    assert colours(found.test.x) == [[0, 0, 4], [0, 1, 4], [1, 0, 4], [1, 1, 4]], "the fifth of every class"
    assert found.train.y.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    assert found.test.y.tolist() == [0, 1, 0, 1]


def test_folders_and_zips_are_the_same_data(tmp_path: Path) -> None:
    domain_tree(tmp_path / "pics")
    before = DOMAINS.load(tmp_path).fingerprint
    zip_first_level(tmp_path / "pics")
    assert DOMAINS.load(tmp_path).fingerprint == before


def test_chosen_domains_come_in_their_order_and_keep_their_labels(tmp_path: Path) -> None:
    domain_tree(tmp_path / "pics")
    shutil.rmtree(tmp_path / "pics/photo/cat")
    both = dataclasses.replace(DOMAINS, domains=("photo", "paint")).load(tmp_path)
    assert [red for red, _, _ in colours(both.test.x)] == [1, 0, 0]
    photo = dataclasses.replace(DOMAINS, domains=("photo",)).load(tmp_path)
    assert (photo.classes, photo.test.y.tolist()) == (2, [1]), "dogs are 1 though there are no cats"
    with pytest.raises(ConfigError, match=r"domains\[0\]: got 'phot'\. Did you mean 'photo'\? Valid: paint, photo"):
        dataclasses.replace(DOMAINS, domains=("phot",)).load(tmp_path)
    for wrong in ((), ("photo", "photo")):
        with pytest.raises(ConfigError, match=r"domains: got .*different names"):
            dataclasses.replace(DOMAINS, domains=wrong)
    with pytest.raises(ConfigError, match=r"domains: got .*unless first_level is domain"):
        ImageFolder(domains=("photo",))


def test_a_tree_of_classes_with_every_kind_of_image(tmp_path: Path) -> None:
    grey = {f"light/{number}.{kind}": encoded(200, kind=kind) for number, kind in enumerate(("png", "bmp", "gif"))}
    write_tree(
        tmp_path / "pics", {**grey, "light/3.JPG": encoded(200, kind="JPEG"), "light/4.pgm": encoded(200, kind="PPM")}
    )
    write_tree(tmp_path / "pics", {f"dark/{n}.png": encoded((0, 10, 0)) for n in range(5)})
    found = ImageFolder("pics", size=None).load(tmp_path)
    assert colours(found.train.x) == [[0, 10, 0]] * 4 + [[200] * 3] * 4
    assert found.test.y.tolist() == [0, 1]
    grey_ones = ImageFolder("pics", size=None, grey=True).load(tmp_path)
    assert colours(grey_ones.test.x) == [[6], [200]], "0.587 of green"
    assert (len(found.mean), len(grey_ones.mean)) == (3, 1)


def test_images_are_squeezed_to_size_or_all_alike(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0, 200], np.uint8), (4, 4))
    stream = io.BytesIO()
    Image.fromarray(stripes).save(stream, "PNG")
    write_tree(tmp_path / "pics", {"a/0.png": stream.getvalue(), "a/1.png": encoded(7, size=(3, 5))})
    found = ImageFolder("pics", size=2, grey=True, test_fraction=0.5).load(tmp_path)
    assert found.train.x.shape == (1, 1, 2, 2)
    np.testing.assert_allclose(found.train.x[0, 0], np.full((2, 2), 100), atol=20, err_msg="means, not single pixels")
    assert found.test.x.ravel().tolist() == [7] * 4
    with pytest.raises(DataError, match=r"a/1\.png: 3x5 pixels, but .*a/0\.png has 8x4\. Set dataset\.size"):
        ImageFolder("pics", size=None, test_fraction=0.5).load(tmp_path)


@pytest.mark.parametrize(
    ("fraction", "number", "test"), [(0.2, 9, [4]), (0.25, 8, [3, 7]), (0.5, 3, [1]), (0.29, 100, 29)]
)
def test_the_fraction_held_out(tmp_path: Path, fraction: float, number: int, test: object) -> None:
    write_tree(tmp_path / "pics", {f"a/{n:03}.png": encoded(n) for n in range(number)})
    found = ImageFolder("pics", size=None, grey=True, test_fraction=fraction).load(tmp_path)
    held_out = found.test.x[:, 0, 0, 0].tolist()
    assert test in (held_out, len(held_out))
    assert sorted(held_out + found.train.x[:, 0, 0, 0].tolist()) == list(range(number))


# A split file


ROWS = ["photo,dog,0,dog/3.png,test", "photo,cat,1,cat/1.png,train", "paint,dog,0,dog/2.png,train"]


@pytest.mark.parametrize("pack", [False, True], ids=["folders", "zips"])
def test_the_index_says_what_is_train_and_which_number_a_class_has(tmp_path: Path, pack: bool) -> None:
    domain_tree(tmp_path / "pics")
    if pack:
        zip_first_level(tmp_path / "pics")
    write_index(tmp_path / "pics", ROWS)
    found = DOMAINS.load(tmp_path)
    assert (colours(found.train.x), found.train.y.tolist()) == ([[0, 1, 2], [1, 0, 1]], [0, 1])
    assert (colours(found.test.x), found.test.y.tolist()) == ([[1, 1, 3]], [0])
    photo = dataclasses.replace(DOMAINS, domains=("photo",)).load(tmp_path)
    assert (colours(photo.train.x), photo.train.y.tolist(), photo.classes) == ([[1, 0, 1]], [1], 2)


def test_an_index_of_a_tree_of_classes_and_without_labels(tmp_path: Path) -> None:
    write_tree(tmp_path / "pics", {f"{kind}/{n}.png": encoded(n) for kind in "ba" for n in range(3)})
    write_index(tmp_path / "pics", ["b,0.png,train", "a,1.png,train", "b,2.png,test"], header="class,file,split")
    found = ImageFolder("pics", size=None, grey=True).load(tmp_path)
    assert (found.train.x[:, 0, 0, 0].tolist(), found.train.y.tolist()) == ([1, 0], [0, 1])
    assert (found.test.x[:, 0, 0, 0].tolist(), found.test.y.tolist()) == ([2], [1])


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (["photo,dog,0,dog/9.png,train"], r"line 5 lists photo/dog/9\.png of class dog: not there"),
        (["photo,cat,1,dog/1.png,train"], r"line 5 lists photo/dog/1\.png of class cat: not there"),
        (["sketch,dog,0,dog/1.png,train"], r"line 5 lists sketch/dog/1\.png of class dog: not there"),
        (["photo,dog,0,../photo/dog/1.png,train"], r"line 5 lists .* not there"),
        (["photo,dog,0,dog/3.png,train"], r"line 5 lists photo/dog/3\.png again"),
        (["photo,dog,0,dog/1.png,val"], "line 5 has split 'val', expected train or test"),
        (["photo,dog,1,dog/1.png,train"], "line 5 has label '1'"),
        (["photo,dog,x,dog/1.png,train"], "line 5 has label 'x'"),
        (["photo,cow,3,cow/1.png,train"], "labels of the 3 classes are not 0 to 2"),
        (["photo,cow,1,cow/1.png,train"], "labels of the 3 classes are not 0 to 2"),
        (["photo,dog,0"], "line 5 has not 5 values"),
        (["photo,dog,0,dog/1.png,train,more"], "line 5 has not 5 values"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, rows: list[str], problem: str) -> None:
    domain_tree(tmp_path / "pics")
    write_index(tmp_path / "pics", ROWS + rows)
    with pytest.raises(DataError, match=rf"index\.csv: .*{problem}"):
        DOMAINS.load(tmp_path)


def test_an_index_without_columns_or_text_is_refused(tmp_path: Path) -> None:
    domain_tree(tmp_path / "pics")
    write_index(tmp_path / "pics", ["dog,dog/1.png"], header="class,file")
    with pytest.raises(DataError, match=r"index\.csv: has no column domain, split\. Put the original back, or remove"):
        DOMAINS.load(tmp_path)
    (tmp_path / "pics/index.csv").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match=r"index\.csv: cannot be read"):
        DOMAINS.load(tmp_path)
    write_index(tmp_path / "pics", ROWS[1:])
    with pytest.raises(DataError, match="pics: there are no test images"):
        DOMAINS.load(tmp_path)


# Damaged trees


def test_another_tree_than_told_is_refused(tmp_path: Path) -> None:
    domain_tree(tmp_path / "pics")
    with pytest.raises(DataError, match=r"paint: holds cat/.\.png, expected IMAGE .*set dataset\.first_level=domain"):
        ImageFolder("pics").load(tmp_path)
    with pytest.raises(DataError, match=r"cat: holds .\.png, expected CLASS/IMAGE .*set dataset\.first_level=class"):
        ImageFolder("pics/paint", "domain").load(tmp_path)
    write_tree(tmp_path / "pics", {"photo/photo/cat/1.png": encoded(1)})
    with pytest.raises(DataError, match=r"photo: holds photo/cat/1\.png, expected CLASS/IMAGE"):
        DOMAINS.load(tmp_path)


def remove(top: Path) -> None:
    shutil.rmtree(top)


def empty(top: Path) -> None:
    for path in top.iterdir():
        shutil.rmtree(path)


def spoil(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda top: write_tree(top, {name: content})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (remove, r"pics: not found\. Put a folder or zip of images for every domain in .*pics"),
        (empty, "pics: holds no folder and no zip"),
        (spoil("photo/cat/1.png", encoded((1, 2, 3))[:40]), r"photo/cat/1\.png: no image or truncated"),
        (spoil("photo/cat/1.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "1.png: no image"),
        (spoil("photo/cat/1.png", encoded(1, kind="TIFF")), r"photo/cat/1\.png: no image"),
        (spoil("photo.zip", b""), r"photo\.zip: photo is there too"),
        (spoil("sketch.zip", b"PK"), r"sketch\.zip: no zip file or truncated"),
        (spoil("sketch/readme.txt", b""), "sketch: there are no images"),
    ],
    ids=["no folder", "nothing", "cut short", "postscript", "another format", "twice", "no zip", "no images"],
)
def test_a_damaged_tree_is_refused(tmp_path: Path, damage: Callable[[Path], None], problem: str) -> None:
    domain_tree(tmp_path / "pics")
    damage(tmp_path / "pics")
    with pytest.raises(DataError, match=problem):
        DOMAINS.load(tmp_path)


def test_a_damaged_member_of_a_zip_is_named(tmp_path: Path) -> None:
    domain_tree(tmp_path / "pics")
    zip_first_level(tmp_path / "pics")
    file = tmp_path / "pics/photo.zip"
    file.write_bytes(file.read_bytes().replace(encoded((1, 1, 3)), b"x" * len(encoded((1, 1, 3)))))
    with pytest.raises(DataError, match=r"photo\.zip/dog/3\.png: cannot be read \(Bad CRC"):
        DOMAINS.load(tmp_path)


def test_deep_pixels_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(stream, "PNG")
    write_tree(tmp_path / "pics", {"a/0.png": encoded(1), "a/1.png": stream.getvalue()})
    with pytest.raises(DataError, match=r"a/1\.png: pixels of mode I;16, expected at most 8 bits"):
        ImageFolder("pics", test_fraction=0.5).load(tmp_path)


def test_too_few_images_to_hold_some_out(tmp_path: Path) -> None:
    write_tree(tmp_path / "pics", {"a/0.png": encoded(1), "b/1.png": encoded(1)})
    with pytest.raises(DataError, match=r"pics: there are no test images\. Add images, or set .*test_fraction"):
        ImageFolder("pics").load(tmp_path)


def test_real_pacs(real: Path) -> None:
    pacs = build(yaml.safe_load((CONF / "pacs.yaml").read_text(encoding="utf-8")), "dataset")
    found = real_dataset(real, pacs, "pacs")
    assert (found.train.x.shape, found.test.x.shape, found.classes) == ((3292, 3, 64, 64), (823, 3, 64, 64), 7)
    with (real / "pacs/index.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["domain"] == "cartoon"]
    cartoon = dataclasses.replace(pacs, domains=("cartoon",), grey=True, size=16).load(real)
    assert cartoon.train.x.shape == (828, 1, 16, 16)
    assert cartoon.test.x.shape == (207, 1, 16, 16)
    assert cartoon.test.y.tolist() == [int(row["label"]) for row in rows if row["split"] == "test"]
    sizes = {
        domain: len(dataclasses.replace(pacs, domains=(domain,), size=1).load(real).train)
        for domain in ("photo", "sketch")
    }
    assert sizes == {"photo": 840, "sketch": 784}
