"""Images a CPU-second, decoded and prepared, beside pydicom, SimpleITK, GDCM, nibabel and Pillow; and peak memory.

Each decoder runs in a process of its own, from a file that the page cache holds; rounds go in turns, and
a figure is the median over rounds of images per second of the process's CPU time (all its threads).
Peers live in an environment of their own, since python-gdcm must not be where pydicom of the project finds it:

    python -m venv PEERS && PEERS/bin/pip install pydicom numpy SimpleITK python-gdcm pylibjpeg pylibjpeg-libjpeg \
        pylibjpeg-openjpeg pylibjpeg-rle pyjpegls pillow nibabel opencv-python-headless
    python benchmarks/decode.py --peer-python PEERS/bin/python [--rounds 5] [--seconds 0.5] [--only NAME ...]

`decode` ends with stored values in memory, `input` with 8-bit pixels at 224 x 224, and so does `reduced`, which is this
project alone with `decode.reduced` (JPEG 2000 at a lower resolution). A peer's way to the
input is what its users write: its own rescale and window functions where it has them, float32, OpenCV.
"Safe" are peers without a crash on the damaged files that crashed the others (SimpleITK, GDCM, pydicom through GDCM).

Images: CT slices of `chest_ct_dicom`; a CR of the corpora (12 bits, cropped to 2048 x 2048) as it is and in each
compression; the JPEG of a chest film of the corpora; a volume of CT slices. Without either folder the case is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

SIDE = 224
_UNSAFE = ("SimpleITK", "gdcm", "pydicom default")
_RASTER = ("png 16 bit 2k", "jpeg 1k")
_REDUCIBLE = ("cr 2k jpeg 2000", "jpeg 1k")
_CLEAR_PEAK = "/proc/self/clear_refs"


# --- in the children: one function a decoder, of a path, to an array -------------------------------------------------


def _ours(kind: str) -> Callable[[str], Any]:
    from medvision_ray.config import DecodeConfig, PreprocessConfig
    from medvision_ray.imaging.decode import decode
    from medvision_ray.imaging.preprocess import prepare
    from medvision_ray.native import reuse_freed_memory

    reuse_freed_memory()  # as every worker does when it starts
    limits, preprocess = DecodeConfig(), PreprocessConfig(size=(SIDE, SIDE))

    def read(path: str) -> Any:
        return decode(Path(path).read_bytes(), limits, None, preprocess.size if kind == "reduced" else None)

    if kind == "decode":
        return lambda path: read(path).pixels
    return lambda path: prepare(read(path), preprocess).pixels


def _to_input(values: Any, window: tuple[float, float] | None) -> Any:
    """The common way: window in float32, to bytes, resized; volumes slice by slice."""
    import cv2
    import numpy as np

    frames = values[None] if values.ndim == 2 else values
    low, high = (window[0] - window[1] / 2, window[0] + window[1] / 2) if window else np.percentile(frames, (0.5, 99.5))
    out = np.empty((len(frames), SIDE, SIDE), np.uint8)
    for index, frame in enumerate(frames):
        unit = np.clip((frame.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)
        out[index] = cv2.resize((unit * 255).astype(np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return out


def _pydicom(kind: str, *, gdcm: bool) -> Callable[[str], Any]:
    import pydicom
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    if not gdcm:
        for decoder in _pydicom_decoders():
            if "gdcm" in decoder.available_plugins:
                decoder.remove_plugin("gdcm")

    def read(path: str) -> Any:
        dataset = pydicom.dcmread(path)
        if kind == "decode":
            return dataset.pixel_array
        values = apply_modality_lut(dataset.pixel_array, dataset)
        if dataset.Modality == "CT":
            return _to_input(values, (40.0, 400.0))
        return _to_input(apply_voi_lut(values, dataset), None)

    return read


def _pydicom_decoders() -> list[Any]:
    from pydicom.pixels import decoders

    return [getattr(decoders, name) for name in dir(decoders) if name.endswith("Decoder") and name != "Decoder"]


def _sitk(kind: str) -> Callable[[str], Any]:
    import SimpleITK as sitk  # noqa: N813 - its own users' name

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)

    def read(path: str) -> Any:
        values = sitk.GetArrayFromImage(sitk.ReadImage(path))
        return values if kind == "decode" else _to_input(values, (40.0, 400.0) if "ct" in path else None)

    return read


def _gdcm(kind: str) -> Callable[[str], Any]:
    import gdcm
    import numpy as np

    def read(path: str) -> Any:
        reader = gdcm.ImageReader()
        reader.SetFileName(path)
        if not reader.Read():
            raise ValueError("unreadable")
        image = reader.GetImage()
        columns, rows = image.GetDimension(0), image.GetDimension(1)
        signed = image.GetPixelFormat().GetPixelRepresentation() == 1
        raw = image.GetBuffer().encode("utf-8", "surrogateescape")
        values = np.frombuffer(raw, np.int16 if signed else np.uint16).reshape(rows, columns)
        if kind == "decode":
            return values
        scaled = values * np.float32(image.GetSlope()) + np.float32(image.GetIntercept())
        return _to_input(scaled, (40.0, 400.0) if "ct" in path else None)

    return read


def _nibabel(kind: str) -> Callable[[str], Any]:
    import nibabel
    import numpy as np

    def read(path: str) -> Any:
        image = nibabel.load(path)
        if kind == "decode":
            return np.asarray(image.dataobj)
        return _to_input(np.asarray(nibabel.as_closest_canonical(image).dataobj).T, None)

    return read


def _pillow(kind: str) -> Callable[[str], Any]:
    import numpy as np
    from PIL import Image

    def read(path: str) -> Any:
        values = np.asarray(Image.open(path))
        return values if kind == "decode" else _to_input(values, None)

    return read


_DECODERS: dict[str, Callable[[str], Callable[[str], Any]]] = {
    "this project": _ours,
    "pydicom default": lambda kind: _pydicom(kind, gdcm=True),
    "pydicom without gdcm": lambda kind: _pydicom(kind, gdcm=False),
    "SimpleITK": _sitk,
    "gdcm": _gdcm,
    "nibabel": _nibabel,
    "Pillow": _pillow,
}


def serve(name: str) -> None:
    """A child: requests of a kind, paths and seconds in; images a CPU-second, or peak memory, out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    readers: dict[str, Callable[[str], Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["kind"] not in readers:
                readers[request["kind"]] = _DECODERS[name](request["kind"])
            answer = _measure(readers[request["kind"]], request)
        except BaseException as error:  # whatever a decoder throws is a reason to leave it out
            answer = {"reason": type(error).__name__}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _measure(read: Callable[[str], Any], request: dict[str, Any]) -> dict[str, Any]:
    paths = request["paths"]
    if request["seconds"] == 0:  # a new process: what an earlier image left to the allocator would hide this one's
        read(paths[0])
        return {"peak_bytes": _peak_of(lambda: read(paths[1]))}
    read(paths[0])
    count, started, elapsed = 0, time.process_time(), 0.0
    while elapsed < request["seconds"] or count < 2:
        read(paths[count % len(paths)])
        count += 1
        elapsed = time.process_time() - started
    return {"rate": count / elapsed}


def _peak_of(call: Callable[[], Any]) -> int:
    """Most resident memory above that before the call."""
    Path(_CLEAR_PEAK).write_text("5")
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


# --- in the parent ---------------------------------------------------------------------------------------------------


class Child:
    """A decoder's process."""

    def __init__(self, python: str, name: str) -> None:
        command = [python, __file__, "--child", name]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p and "site-packages" not in p),
        }
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def ask(self, kind: str, paths: list[str], seconds: float) -> dict[str, Any]:
        """One measurement, or the reason why there is none."""
        try:
            self._process.stdin.write(json.dumps({"kind": kind, "paths": paths, "seconds": seconds}) + "\n")
            self._process.stdin.flush()
            found: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, json.JSONDecodeError):
            return {"reason": "its process died"}
        return found

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def make_files(folder: Path, data: Path, corpora: Path) -> dict[str, tuple[list[str], int]]:
    """Paths of each case's files, and the bytes of one decoded."""
    _small_files(folder)
    cases: dict[str, tuple[list[str], int]] = {}
    slices = sorted((data / "chest_ct_dicom").rglob("*.dcm"))[:50]
    if slices:
        cases["ct 512 uncompressed"] = ([_link(folder, path) for path in slices], 512 * 512 * 2)
        cases["nifti gz 256^3"] = ([_volume(folder, slices)], 256**3 * 2)
    film = corpora / "pylibjpeg-data/ljdata/ds/JPEG2000Lossless/NM_Kakadu44_SOTmarkerincons.dcm"
    if film.exists():
        for name, path in _films(folder, film).items():
            cases[name] = ([path], 2048 * 2048 * 2)
    photograph = corpora / "torchxrayvision/tests/1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"
    if photograph.exists():
        cases["jpeg 1k"] = ([_jpeg(folder, photograph)], 1024 * 1024)
    return cases


def _small_files(folder: Path) -> None:
    """One of each format, by which a process loads what it needs."""
    import numpy as np

    from medvision_ray.demo import encode

    subject = encode.Subject("DOE^JANE", "1", "1", 1, 0)
    picture = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    (folder / "small.dcm").write_bytes(encode.ct_dicom(subject, 0, picture, signed=False, compressed=True))
    (folder / "small.nii.gz").write_bytes(encode.nifti(subject, np.stack([picture] * 2)))
    (folder / "small.png").write_bytes(encode.png(picture, bits=16))
    (folder / "small.jpg").write_bytes(encode.jpeg(picture))


def _link(folder: Path, path: Path) -> str:
    place = folder / f"ct-{path.name}"
    place.write_bytes(path.read_bytes())
    return str(place)


def _volume(folder: Path, slices: list[Path]) -> str:
    """256 slices of real CT at half resolution, as one compressed volume."""
    import cv2
    import nibabel
    import numpy as np
    import pydicom

    pixels = [pydicom.dcmread(path).pixel_array.astype(np.int16) for path in slices]
    small = [cv2.resize(frame, (256, 256), interpolation=cv2.INTER_NEAREST) for frame in pixels]
    stack = np.stack([small[index % len(small)] for index in range(256)], axis=-1)
    place = str(folder / "volume.nii.gz")
    nibabel.save(nibabel.Nifti1Image(stack, np.diag([-1.0, -1.0, 1.0, 1.0])), place)
    return place


def _films(folder: Path, source: Path) -> dict[str, str]:
    """The same 12-bit film, 2048 x 2048, in every compression that loses nothing."""
    import cv2
    import imagecodecs
    import numpy as np
    import pydicom
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID, ExplicitVRLittleEndian, RLELossless

    from medvision_ray.config import DecodeConfig
    from medvision_ray.imaging.decode import decode

    pixels = np.ascontiguousarray(decode(source.read_bytes(), DecodeConfig()).pixels[0][:2048, :2048])
    plain = pydicom.dcmread(source)
    plain.Rows = plain.Columns = 2048
    plain.BitsAllocated, plain.BitsStored, plain.HighBit, plain.PixelRepresentation = 16, 12, 11, 0
    plain.PixelData = pixels.astype("<u2").tobytes()
    plain["PixelData"].VR, plain["PixelData"].is_undefined_length = "OW", False
    plain.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found = {}

    def save(name: str) -> None:
        found[name] = str(folder / f"{name.replace(' ', '-')}.dcm")
        plain.save_as(found[name], enforce_file_format=True)

    save("cr 2k uncompressed")
    for name, syntax, code in (
        (
            "cr 2k jpeg lossless",
            "1.2.840.10008.1.2.4.70",
            imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=12),
        ),
        ("cr 2k jpeg-ls", "1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode(pixels)),
        (
            "cr 2k jpeg 2000",
            "1.2.840.10008.1.2.4.90",
            imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True, level=0, bitspersample=12),
        ),
    ):
        plain.PixelData = encapsulate([code])
        plain["PixelData"].VR, plain["PixelData"].is_undefined_length = "OB", True
        plain.file_meta.TransferSyntaxUID = UID(syntax)
        save(name)
        decoded = decode(Path(found[name]).read_bytes(), DecodeConfig()).pixels[0]
        if not np.array_equal(decoded, pixels):
            raise SystemExit(f"Expected {name} to hold the film's own pixels, but it holds others.")
    plain.PixelData = pixels.astype("<u2").tobytes()
    plain["PixelData"].VR, plain["PixelData"].is_undefined_length = "OW", False
    plain.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    plain.compress(RLELossless, generate_instance_uid=False)
    save("cr 2k rle")
    found["png 16 bit 2k"] = str(folder / "film.png")
    cv2.imwrite(found["png 16 bit 2k"], pixels << 4)
    return found


def _jpeg(folder: Path, source: Path) -> str:
    import pydicom
    from pydicom.encaps import generate_frames

    place = folder / "film.jpg"
    place.write_bytes(next(generate_frames(pydicom.dcmread(source).PixelData, number_of_frames=1)))
    return str(place)


def _peers_of(case: str) -> list[str]:
    if case.startswith("nifti"):
        return ["SimpleITK", "nibabel"]
    if case in _RASTER:
        return ["SimpleITK", "Pillow"]
    return ["pydicom default", "pydicom without gdcm", "SimpleITK", "gdcm"]


def measure(case: str, paths: list[str], decoded: int, options: argparse.Namespace) -> dict[str, Any]:
    """Rates of every decoder in turns, and our peak memory."""
    names = ["this project", *_peers_of(case)]
    pythons = {name: options.peer_python or "" for name in names} | {"this project": sys.executable}
    children = {name: Child(pythons[name], name) for name in names if pythons[name]}
    result: dict[str, Any] = {"decoded_megabytes": round(decoded / 1e6, 2), "files": len(paths)}
    for kind in ("decode", "input"):
        rates: dict[str, list[float]] = {name: [] for name in children}
        reasons = {name: "no --peer-python" for name in names if name not in children}
        for _ in range(options.rounds):
            for name, child in children.items():
                answer = child.ask(kind, paths, options.seconds) if name not in reasons else {"reason": reasons[name]}
                if "rate" in answer:
                    rates[name].append(answer["rate"])
                else:
                    reasons[name] = answer["reason"]
        found = {name: round(median(values), 2) for name, values in rates.items() if values and name not in reasons}
        result[kind] = {"images_per_cpu_second": found, "left_out": reasons, **_compared(found)}
    kinds = ["decode", "input"]
    if case in _REDUCIBLE:
        kinds.append("reduced")
        result["reduced"] = _reduced(children["this project"], paths, options)
    for child in children.values():
        child.close()
    result["peak_memory_over_decoded"] = {kind: _peak(kind, paths[0], decoded) for kind in kinds}
    return result


def _reduced(child: Child, paths: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Our own rates to the input without and with a lower resolution, in turns."""
    rates: dict[str, list[float]] = {"input": [], "reduced": []}
    for _ in range(options.rounds):
        for kind, found in rates.items():
            found.append(child.ask(kind, paths, options.seconds)["rate"])
    whole, less = (median(rates[kind]) for kind in ("input", "reduced"))
    return {"images_per_cpu_second": {"this project": round(less, 2)}, "ratio_to_whole": round(less / whole, 2)}


def _peak(kind: str, path: str, decoded: int) -> float | None:
    """Most memory above what a worker has after a small image of the same format, over the bytes of a decoded one."""
    child = Child(sys.executable, "this project")
    small = next(str(place) for place in Path(path).parent.glob("small*") if place.suffix == Path(path).suffix)
    peak = child.ask(kind, [small, path], 0).get("peak_bytes")
    child.close()
    return round(peak / decoded, 2) if peak is not None else None


def _compared(rates: dict[str, float]) -> dict[str, Any]:
    ours = rates.get("this project")
    peers = {name: rate for name, rate in rates.items() if name != "this project"}
    safe = {name: rate for name, rate in peers.items() if name not in _UNSAFE}
    found: dict[str, Any] = {}
    for label, group in (("fastest_peer", peers), ("fastest_safe_peer", safe)):
        if group and ours:
            best = max(group, key=lambda name: group[name])
            found[label], found[f"ratio_to_{label}"] = best, round(ours / group[best], 3)
    return found


def main() -> None:
    """Measure every case and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer-python", default=os.environ.get("MEDVISION_PEER_PYTHON"), help="interpreter with the peers"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU time of one measurement")
    parser.add_argument("--only", nargs="+", help="names of cases; their figures replace the recorded ones")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(options.child)
        return
    from facts import RESULTS, machine, print_table, write_results

    folders = [Path(os.environ.get(f"MEDVISION_{name}", f"../shared/{name.lower()}")) for name in ("DATA", "CORPORA")]
    place = RESULTS / "decode.json"
    recorded = json.loads(place.read_text())["cases"] if options.only and place.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        cases = make_files(Path(folder), *folders)
        for case, (paths, decoded) in cases.items():
            if not options.only or case in options.only:
                recorded[case] = measure(case, paths, decoded, options)
                sys.stderr.write(f"{case}: {json.dumps(recorded[case])}\n")
    goals = {"ratio_to_fastest_safe_peer": ">= 0.95", "peak_memory_over_decoded": "< 4"}
    facts = machine("pydicom", "imagecodecs", "pylibjpeg-rle", "opencv-python-headless", "nibabel")
    write_results(
        "decode", {"goals": goals, "cases": recorded, "peers": _versions(options.peer_python), "machine": facts}
    )
    rows: list[tuple[object, ...]] = []
    for case, found in recorded.items():
        for kind, peak in found["peak_memory_over_decoded"].items():
            part = found[kind]
            peer, rates = part.get("fastest_safe_peer", ""), part["images_per_cpu_second"]
            ratio = part.get("ratio_to_fastest_safe_peer", "")
            rows.append((case, kind, rates.get("this project"), peer, rates.get(peer, ""), ratio, peak))
    print_table(("case", "to", "ours", "fastest safe peer", "its rate", "ratio", "peak over decoded"), rows)


def _versions(python: str | None) -> dict[str, str]:
    """Versions of the peers."""
    if not python:
        return {}
    code = (
        "import importlib.metadata as m, json; names = 'pydicom SimpleITK python-gdcm pylibjpeg-libjpeg pylibjpeg-openjpeg "
        "pylibjpeg-rle pyjpegls pillow nibabel opencv-python-headless'.split();"
        "print(json.dumps({n: m.version(n) for n in names}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


if __name__ == "__main__":
    main()
