"""Image files of every kind, against torchvision's own decoders, and files that are none."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from kdvit.data.reading import DamagedImage, ImageError, read_image

DRAW = np.random.RandomState(0)
BLOCKS = np.kron(DRAW.randint(0, 256, (3, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))


def pixels(file: str) -> np.ndarray:
    image = read_image(file)
    assert image.mode == "RGB"
    return np.asarray(image)


def reference(file: str, mode: ImageReadMode = ImageReadMode.RGB) -> np.ndarray:
    return decode_image(torch.from_numpy(np.fromfile(file, np.uint8)), mode).permute(1, 2, 0).numpy()


def test_a_cmyk_jpeg_has_the_colours_that_it_was_made_of() -> None:
    inks = np.concatenate([255 - BLOCKS, np.zeros_like(BLOCKS[..., :1])], axis=2)
    Image.fromarray(inks, "CMYK").save("cmyk.jpg", quality=100)
    assert np.abs(pixels("cmyk.jpg").astype(int) - BLOCKS).max() <= 2
    assert np.array_equal(pixels("cmyk.jpg"), reference("cmyk.jpg"))


def test_16_bits_are_rounded_to_8_and_not_clipped() -> None:
    values = DRAW.randint(0, 65536, (40, 40)).astype(np.uint16)
    values[0, :3] = 0, 128, 65535
    Image.fromarray(values).save("grey.png")
    deep = reference("grey.png", ImageReadMode.UNCHANGED).astype(np.float64)
    for channel in range(3):
        assert np.array_equal(pixels("grey.png")[..., channel], np.round(deep[..., 0] / 257))
    for file in ("grey.tif", "grey.pgm"):
        Image.fromarray(values).save(file)
        assert np.array_equal(pixels(file), pixels("grey.png")), file


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_other_mode_is_what_torchvision_reads(mode: str) -> None:
    Image.fromarray(BLOCKS).convert(mode).save("image.png")
    assert np.array_equal(pixels("image.png"), reference("image.png"))


@pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"], ids=["one colour", "each colour"])
def test_a_palette_keeps_its_colours_under_transparency(transparency: int | bytes) -> None:
    Image.fromarray(BLOCKS).convert("P").save("opaque.png")
    Image.fromarray(BLOCKS).convert("P").save("image.png", transparency=transparency)
    assert np.array_equal(pixels("image.png"), reference("opaque.png"))


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


@pytest.mark.slow
def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    for side in (10_000, 40_000):  # Pillow warns of the one, and refuses the other
        Path(f"{side}.png").write_bytes(png_header(side, side))
        message = f"Cannot read the image '{side}.png': it unpacks to more than 89,478,485 pixels; scale it down. "
        with pytest.raises(DamagedImage, match=message):
            read_image(f"{side}.png")
    reading = """
import resource
from kdvit.data.reading import ImageError, read_image
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for file in ("10000.png", "40000.png"):
    try: read_image(file)
    except ImageError: print(peak() - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, "-c", reading], capture_output=True, text=True, env=environment, timeout=240)
    kilobytes = [int(line) for line in done.stdout.split()]
    assert len(kilobytes) == 2
    assert max(kilobytes) < 20_000


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        ("empty.jpg", lambda file: file.touch(), "the file is empty"),
        ("text.jpg", lambda file: file.write_text("no image"), "no image of a known format"),
        ("link.jpg", lambda file: file.symlink_to("gone.jpg"), "No such file"),
        ("folder.jpg", lambda file: file.mkdir(), "Is a directory"),
        ("gone.jpg", lambda file: None, "No such file"),
        ("cut.jpg", lambda file: file.write_bytes(_jpeg()[:-300]), "runcated"),
        ("float.tif", lambda file: Image.fromarray(np.zeros((4, 4), np.float32)).save(file), "pixels are floats"),
        (
            "deep.tif",
            lambda file: Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(file),
            "70000; expected 0 to",
        ),
    ],
)
def test_a_file_that_is_no_image_is_told_in_one_line_with_its_path(name: str, make, text: str) -> None:
    make(Path(name))
    with pytest.raises(DamagedImage) as error:
        read_image(name)
    message = str(error.value)
    assert message.startswith(f"Cannot read the image '{name}': ")
    assert text in message
    assert message.endswith("Repair or remove it.")
    assert "\n" not in message


def _jpeg() -> bytes:
    Image.fromarray(BLOCKS).save("whole.jpg")
    return Path("whole.jpg").read_bytes()


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_an_error_of_the_machine_does_not_make_an_image_a_bad_one(number: int, monkeypatch) -> None:
    def failing(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("PIL.Image.open", failing)
    with pytest.raises(ImageError, match=os.strerror(number)) as error:
        read_image("image.jpg")
    assert type(error.value) is ImageError
    assert str(error.value).endswith("The file may be whole: check the disk or the machine.")


def test_an_image_that_may_not_be_read_is_named(monkeypatch) -> None:
    def forbidden(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("PIL.Image.open", forbidden)
    with pytest.raises(DamagedImage, match=r"Cannot read the image 'image.jpg': Permission denied"):
        read_image("image.jpg")
