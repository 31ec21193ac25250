"""Images that nobody here made: the test images that the source packages of imaging libraries carry.

Every file goes through a folder, tars, Parquet and URLs of a server on this machine. It must become a sample within
one level of Pillow's reading, or a counted drop.

    pip download --no-deps --no-binary pillow,scikit-image,matplotlib pillow scikit-image matplotlib
    python -m benchmarks.real_images *.tar.gz --out benchmarks/results/real_images.json

image-rs is the crate `image`, or its repository as a .tar.gz.
"""

import argparse
import csv
import io
import re
import signal
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageCms, ImageOps

from benchmarks.common import report
from imagen_core.store import Store
from pipeline.config import load_config
from pipeline.options import RunOptions
from workflows.precompute import Precompute, PrecomputeConfig

SIZE_PX = 64
SUFFIXES = re.compile(
    r"\.(apng|avif|blp|bmp|cur|dds|dib|exr|ff|fits|fl[ci]|gif|hdr|hei[cf]|icns|ico|im|j2[ck]|jfif|jp2|jpe|jpe?g|jxl|mpo"
    r"|msp|p7|p[bfgnp]m|pcx|png|psd|qoi|ras|rgba?|sgi|tga|tiff?|webp|xbm|xpm)",
    re.IGNORECASE,
)
"""Files of these suffixes are called images; the others of the archives are left out."""
MAX_SECONDS = 30
MOST_OFF_BY_2 = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", type=Path, help="source packages (.tar.gz, .crate)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    files = [file for archive in arguments.archives for file in images_of(archive)]
    with tempfile.TemporaryDirectory() as work:
        results, stores = run_all(files, Path(work))
        agreements, others = compare(files, stores["parquet"])
        same = all(equal(stores["parquet"], store) for store in stores.values())
    for row in results:
        row.update(agreements if row["through"] == "parquet" else {})
    report(
        "real_images",
        results,
        {"files": len(files), "stores whose common samples have equal pixels": len(stores) if same else 0},
        arguments.out,
        packages=["pillow", "imagen-precompute"],
        notes=[
            f"{len(files)} files of {', '.join(archive.name for archive in arguments.archives)}",
            "files = samples + drops + ignored; a source ignores suffixes that it does not read",
            f"within 1 level at {SIZE_PX} px of Pillow's first frame, turned, on white: as it is, or with its profile "
            "converted by ImageCms; of more than 8 bits: values scaled by the range that the file states",
            "off by 2: in fewer than 1 of 1,000 values, which torch's resizing rounds otherwise than Pillow's; the "
            "decoded pixels are equal",
            f"neither: {'; '.join(others) or 'none'}",
        ],
    )


def images_of(archive: Path) -> list[tuple[str, bytes]]:
    """Name and content of each image in a source package."""
    with tarfile.open(archive) as tar:
        members = [m for m in tar if m.isfile() and SUFFIXES.fullmatch(PurePosixPath(m.name).suffix)]
        return [(member.name, tar.extractfile(member).read()) for member in members]  # pyright: ignore


def run_all(files: list[tuple[str, bytes]], work: Path) -> tuple[list[dict[str, Any]], dict[str, Store]]:
    """Precomputes the files through each source; rows of counts, and the stores."""
    names = [f"{index:05d}{PurePosixPath(name).suffix}" for index, (name, _) in enumerate(files)]
    contents = [data for _, data in files]
    for folder in ("files", "tars"):
        (work / folder).mkdir()
    with tarfile.open(work / "tars/images.tar", "w") as tar:
        for name, data in zip(names, contents, strict=True):
            (work / "files" / name).write_bytes(data)
            (work / "files" / name).with_suffix(".txt").write_text(name)
            for member, content in ((name, data), (name.split(".", maxsplit=1)[0] + ".txt", name.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    pq.write_table(pa.table({"image": contents, "caption": names}), work / "images.parquet", row_group_size=50)
    with served(work / "files") as address:
        with (work / "urls.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["url", "caption"], *([f"{address}/{name}", name] for name in names)])
        sources = {
            "folder": ["source.kind=folder", f"source.path={work}/files"],
            "tars": ["source.kind=webdataset", f"source.path={work}/tars"],
            "parquet": ["source.kind=parquet", f"source.path={work}/images.parquet"],
            "urls": [
                "source.kind=urls",
                f"source.path={work}/urls.csv",
                "source.download.allow_private_addresses=true",
            ],
        }
        results, stores = [], {}
        for through, source in sources.items():
            out = work / f"run-{through}"
            options = [*source, f"images.sizes_px=[{SIZE_PX}]", "encoders=[]", "max_drop_fraction=1"]
            options.append("filters=[{kind: too_small, action: upscale}]")
            config = load_config(PrecomputeConfig, None, options)
            summary: dict[str, Any] = Precompute(config).run(str(out), RunOptions("inline", quiet=True))
            drops = summary["tally"]["groups"]["samples"]["drops"]
            samples = summary["num_samples"]
            ignored = len(files) - samples - sum(drops.values())
            counts = {"files": len(files), "samples": samples, "drops": sum(drops.values()), "ignored": ignored}
            results.append({"through": through, **counts, **dict(sorted(drops.items()))})
            stores[through] = Store.open(out / "store")
        return results, stores


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder on this machine; gives its address."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def equal(first: Store, second: Store) -> bool:
    """Whether samples of the same file have equal pixels in both stores."""
    pixels = {sample.captions[0]: sample.images[SIZE_PX] for sample in first}
    return all(
        np.array_equal(pixels[sample.captions[0]], sample.images[SIZE_PX])
        for sample in second
        if sample.captions[0] in pixels
    )


def compare(files: list[tuple[str, bytes]], store: Store) -> tuple[dict[str, int], list[str]]:
    """How many samples agree with which reading of Pillow, and the names of those that agree with none."""
    counts: Counter[str] = Counter()
    others = []
    for sample in store:
        name, data = files[int(sample.captions[0].split(".")[0])]
        kind = agreement(sample.images[SIZE_PX], data)
        counts[kind] += 1
        if kind == "neither":
            others.append(PurePosixPath(name).name)
    return dict(sorted(counts.items())), others


def agreement(ours: np.ndarray, data: bytes) -> str:
    """The reading of Pillow that is within one level of a sample."""
    warnings.simplefilter("ignore")
    signal.alarm(MAX_SECONDS)
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, ValueError, SyntaxError) as error:
        return f"Pillow: {type(error).__name__}"
    finally:
        signal.alarm(0)
    is_deep = image.mode == "F" or image.mode.startswith("I")
    profile = image.info.get("icc_profile")
    for kind, reading in (("as it is", on_white), ("with its profile", partial(converted, profile=profile))):
        try:
            reference = reading(ImageOps.exif_transpose(image))
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            continue
        difference = np.abs(ours.astype(int) - squared(reference))
        if not is_deep and difference.max() <= 1:
            return kind
        if not is_deep and difference.max() <= 2 and (difference > 1).mean() < MOST_OFF_BY_2:
            return f"{kind}, off by 2"
    return "more than 8 bits" if is_deep else "neither"


def on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def converted(image: Image.Image, profile: bytes) -> Image.Image:
    """On white, with the colours converted to sRGB."""
    alpha = image.convert("RGBA").getchannel("A")
    colour = image if image.mode in ("L", "CMYK", "LAB") else image.convert("RGB")
    source = ImageCms.createProfile("LAB") if colour.mode == "LAB" else ImageCms.getOpenProfile(io.BytesIO(profile))
    flags = ImageCms.Flags.NOOPTIMIZE if colour.mode == "L" else ImageCms.Flags.NONE
    rgb = ImageCms.profileToProfile(colour, source, ImageCms.createProfile("sRGB"), outputMode="RGB", flags=flags)
    assert rgb is not None
    rgb.putalpha(alpha)
    return on_white(rgb)


def squared(image: Image.Image) -> np.ndarray:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)).astype(int)


if __name__ == "__main__":
    main()
