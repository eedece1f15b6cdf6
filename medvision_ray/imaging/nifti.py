"""NIfTI-1 and NIfTI-2 volumes: header first, then exactly as many bytes as it names, slices as frames.

A frame is an axial slice as a radiologist sees it: rows run anterior to posterior, columns from the
patient's right to the patient's left (DICOM's LPS grid), frames from feet to head. Voxel axes are
permuted and flipped to the closest such grid, never resampled.
"""

from __future__ import annotations

import math
import zlib

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.dicom_header import require_size
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.geometry import LPS_TO_RAS, Floats, Geometry, SpacingSource, geometry_of_affine
from medvision_ray.imaging.header_fields import HeaderFields
from medvision_ray.imaging.image import Display, MedicalImage

_GZIP = b"\x1f\x8b"
_LONGEST_HEADER = 540
_RGB, _RGBA = 128, 2304
_KINDS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_TARGET = axcodes2ornt(("L", "P", "S"))


def looks_like_nifti(data: bytes) -> bool:
    """Whether the content is NIfTI-1 or -2, plain or gzip-compressed."""
    if data[:2] == _GZIP:
        try:
            data = zlib.decompressobj(31).decompress(data[:4096], _LONGEST_HEADER)
        except zlib.error:
            return False
    return _version(data) > 0


def decode_nifti(data: bytes, config: DecodeConfig) -> MedicalImage:
    """Decode one volume; see `decode.decode`, which also maps what nibabel raises.

    Raises:
        DecodeError: BAD_HEADER, BAD_DIMENSIONS, TOO_LARGE, TRUNCATED, UNSUPPORTED_ENCODING or
            UNSUPPORTED_SHAPE (more than three dimensions without `volume_index`, or past it).
    """
    head = zlib.decompressobj(31).decompress(data, _LONGEST_HEADER) if data[:2] == _GZIP else data[:_LONGEST_HEADER]
    header = _header(head)
    shape = _shape(header)
    volumes = math.prod(shape[3:])
    volume = _volume_index(volumes, config)
    code = int(header["datatype"])
    itemsize = {_RGB: 3, _RGBA: 4}.get(code) or np.dtype(_KINDS.get(code, "V0")).itemsize
    if not itemsize:
        raise DecodeError(ErrorCode.UNSUPPORTED_ENCODING, datatype=code)
    voxels = math.prod(shape[:3])
    for plane in ((0, 1), (0, 2), (1, 2)):
        require_size(config, shape[plane[0]], shape[plane[1]], 1, itemsize)
    require_size(config, shape[0], shape[1], min(shape[2], config.max_frames), itemsize)
    if voxels * itemsize > config.max_decoded_bytes:
        raise DecodeError(ErrorCode.TOO_LARGE, decoded_bytes=voxels * itemsize, limit=config.max_decoded_bytes)
    offset = _data_offset(header, len(head)) + volume * voxels * itemsize
    if offset + voxels * itemsize > max(config.max_decoded_bytes, len(data)):
        raise DecodeError(ErrorCode.DECOMPRESSION_BOMB, limit=config.max_decoded_bytes)
    raw = _content(data, offset + voxels * itemsize, whole=volume == volumes - 1)
    turn = _to_target(header)
    grid = _axial(_voxels(raw, offset, shape[:3], code, header.endianness), turn)
    require_size(config, grid.shape[1], grid.shape[2], grid.shape[0], itemsize)
    return MedicalImage(
        pixels=np.ascontiguousarray(grid),
        modality="OT",
        display=_display(header, code),
        spacing_mm=_spacing(header, turn),
        spacing_source=SpacingSource.AFFINE,
        geometry=_geometry(header, turn, shape[:3]),
        slice_order=tuple(range(len(grid))),
        header=HeaderFields(may_contain_text=code in (_RGB, _RGBA)),
        source_format="nifti",
    )


def _version(head: bytes) -> int:
    if head[344:348] in (b"n+1\0", b"ni1\0") and 348 in (
        int.from_bytes(head[:4], "little"),
        int.from_bytes(head[:4], "big"),
    ):
        return 1
    return 2 if head[4:8] in (b"n+2\0", b"ni2\0") and len(head) >= _LONGEST_HEADER else 0


def _header(head: bytes) -> nibabel.Nifti1Header:
    if b"ni1\0" in (head[344:348],) or b"ni2\0" in (head[4:8],):  # pixels are in an .img file of their own
        raise DecodeError(ErrorCode.UNSUPPORTED_FORMAT, kind="nifti_pair")
    kind = nibabel.Nifti1Header if _version(head) == 1 else nibabel.Nifti2Header
    return kind(head[: kind.template_dtype.itemsize], check=False)


def _shape(header: nibabel.Nifti1Header) -> tuple[int, ...]:
    count = int(header["dim"][0])
    sides = tuple(int(x) for x in header["dim"][1 : count + 1]) if 1 <= count <= 7 else ()
    if not sides or min(sides) < 1:
        raise DecodeError(ErrorCode.BAD_DIMENSIONS, dimensions=count)
    if len(sides) < 2:
        raise DecodeError(ErrorCode.UNSUPPORTED_SHAPE, dimensions=count)
    return sides + (1,) * (3 - len(sides))


def _volume_index(volumes: int, config: DecodeConfig) -> int:
    if volumes == 1:
        return 0
    if config.volume_index is None or config.volume_index >= volumes:
        raise DecodeError(ErrorCode.UNSUPPORTED_SHAPE, volumes=volumes)
    return config.volume_index


def _data_offset(header: nibabel.Nifti1Header, head_bytes: int) -> int:
    offset = float(header["vox_offset"])
    smallest = 352 if _is_first(header) else 544
    if not math.isfinite(offset) or offset < 0 or offset > 1 << 40 or head_bytes < smallest - 4:
        raise DecodeError(ErrorCode.BAD_HEADER, field="vox_offset")
    return max(int(offset), smallest)  # some writers leave it at 0


def _is_first(header: nibabel.Nifti1Header) -> bool:
    return int(header["sizeof_hdr"]) == 348


def _content(data: bytes, needed: int, whole: bool) -> bytes:
    """The first `needed` bytes of the plain content; nothing beyond them is ever inflated.

    Raises:
        DecodeError: TRUNCATED where there are fewer.
    """
    if data[:2] != _GZIP:
        if len(data) < needed:
            raise DecodeError(ErrorCode.TRUNCATED, expected_bytes=needed, actual_bytes=len(data))
        return data
    parts: list[bytes] = []
    found, rest = 0, data
    while found < needed and rest[:2] == _GZIP:  # members may follow one another
        inflater = zlib.decompressobj(31)
        part = inflater.decompress(rest, needed - found)
        parts.append(part)
        found += len(part)
        rest = inflater.unused_data
        if found == needed and whole and not inflater.eof:
            inflater.decompress(inflater.unconsumed_tail, 1)  # reaches the checksum, which raises where it is wrong
    if found < needed:
        raise DecodeError(ErrorCode.TRUNCATED, expected_bytes=needed, actual_bytes=found)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _voxels(raw: bytes, offset: int, shape: tuple[int, ...], code: int, endianness: str) -> NDArray[np.generic]:
    """Voxels on the file's own axes, `(i, j, k)` or `(i, j, k, 3)` RGB."""
    count = math.prod(shape)
    if code in (_RGB, _RGBA):
        channels = 3 if code == _RGB else 4
        colours = np.frombuffer(raw, np.uint8, count * channels, offset).reshape(*shape[::-1], channels)
        return colours[..., :3].transpose(2, 1, 0, 3)
    values = np.frombuffer(raw, np.dtype(_KINDS[code]).newbyteorder(endianness), count, offset)  # type: ignore[arg-type]
    return values.astype(values.dtype.newbyteorder("="), copy=False).reshape(shape[::-1]).T


def _axial(voxels: NDArray[np.generic], turn: Floats) -> NDArray[np.generic]:
    """Reorder `(i, j, k, ...)` to `(frames, rows, columns, ...)`."""
    return np.swapaxes(nibabel.apply_orientation(voxels, turn), 0, 2)


def _to_target(header: nibabel.Nifti1Header) -> Floats:
    """How the file's axes are permuted and flipped, in nibabel's form: target axis and direction of each, `(3, 2)`."""
    affine = header.get_best_affine()
    if not np.isfinite(affine).all():
        raise DecodeError(ErrorCode.BAD_HEADER, field="affine")
    orientation = io_orientation(affine)
    if not np.isfinite(orientation).all():  # a zero column: an axis without direction
        raise DecodeError(ErrorCode.BAD_HEADER, field="affine")
    return np.asarray(ornt_transform(orientation, _TARGET))


def _display(header: nibabel.Nifti1Header, code: int) -> Display:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if code in (_RGB, _RGBA) or not math.isfinite(slope) or slope == 0:
        return Display()
    return Display(slope=slope, intercept=intercept if math.isfinite(intercept) else 0.0)


def _geometry(header: nibabel.Nifti1Header, turn: Floats, shape: tuple[int, ...]) -> Geometry | None:
    """Where the reordered voxels lie; None where the file does not say (neither sform nor qform is set)."""
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        return None
    affine_ras = header.get_best_affine() @ inv_ornt_aff(turn, shape)
    affine_ras[:3] *= _unit_mm(header)
    return geometry_of_affine(LPS_TO_RAS @ affine_ras, single=shape[int(np.argmax(turn[:, 0]))] == 1)


def _spacing(header: nibabel.Nifti1Header, turn: Floats) -> tuple[float, float]:
    """Row and column spacing in mm after reordering, from the header's affine."""
    sides = np.sqrt((header.get_best_affine()[:3, :3] ** 2).sum(axis=0)) * _unit_mm(header)
    placed = np.empty(3)
    placed[turn[:, 0].astype(int)] = sides
    return float(placed[1]), float(placed[0])


def _unit_mm(header: nibabel.Nifti1Header) -> float:
    """The header's unit of length; mm where it names none, as everywhere."""
    return {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
