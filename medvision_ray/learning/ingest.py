"""Labelled images to prepared pixels, once, with Ray Data: read, decode, prepare, digest; failures are rows too."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medvision_ray import storage
from medvision_ray.config import DecodeConfig, PreprocessConfig, TrainJob
from medvision_ray.errors import LabelError, MedVisionError, StorageError
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.imaging.image import MedicalImage
from medvision_ray.learning.image_facts import FACTS, header_reader, image_facts
from medvision_ray.learning.labels import LabelTable
from medvision_ray.learning.near_duplicates import perceptual_hash
from medvision_ray.learning.splits import duplicate_groups, row_numbers
from medvision_ray.privacy import Pseudonymiser

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # row of the label table
        ("pixels", pa.large_binary()),  # uint8 (C, H, W); null for test rows and failures
        ("mask", pa.large_binary()),  # uint8 (H, W), 1 is lesion; null without a mask
        ("digest", pa.string()),  # sha256 of the stored pixels; empty for failures
        ("error_code", pa.string()),  # empty where all went well
        ("perceptual_hash", pa.binary()),  # of the middle frame; empty for failures and frames without structure
        ("facts", FACTS),  # null for failures
    ]
)
_MOST_BLOCK_ROWS = 64
_BLOCKS_PER_CPU = 4
_WORKER_RETRIES = 2
_STORE_SHARE = 0.6
_EXAMPLES = 3
_TOLD = ["index", "digest", "error_code", "perceptual_hash", "facts"]


@dataclass(frozen=True)
class DecodedImages:
    """The labelled images in Ray's object store.

    Attributes:
        dataset: materialised Ray dataset of `SCHEMA`, one row an image, in no particular order.
        digests: of each row of the label table; empty where it failed.
        error_codes: of each row of the label table; empty where it did not fail.
        hashes: perceptual hash of each row; empty where it failed or has no structure.
        facts: `image_facts` of each row; None where it failed.
    """

    dataset: Any
    digests: tuple[str, ...]
    error_codes: tuple[str, ...]
    hashes: tuple[bytes, ...]
    facts: tuple[dict[str, Any] | None, ...]

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Shape `(n,)`: the image was decoded."""
        return np.array([not code for code in self.error_codes], dtype=bool)

    @property
    def failures(self) -> dict[str, int]:
        """Images per error code."""
        return dict(sorted(Counter(code for code in self.error_codes if code).items()))


def decode_images(table: LabelTable, job: TrainJob) -> DecodedImages:
    """Read, decode and prepare every labelled image once; the pixels of train and val stay in the object store.

    The test split is decoded for its digests only, so that copies of a training image in it are found.
    Ray must be connected.

    Raises:
        MedVisionError: the prepared images do not fit the object store, or a worker died again and again on one.
    """
    import ray
    from ray.util.annotations import RayDeprecationWarning

    _check_store(table, job.preprocess)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    dataset = ray.data.from_blocks(_requests(table, cpus))
    dataset.context.enable_progress_bars = False
    config = {"decode": job.decode, "preprocess": job.preprocess, "reader": header_reader(job.privacy)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # of `max_retries`, which goes in 2.64; pinned below
        rows = dataset.map_batches(
            _decode_batch,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs=config,
            num_cpus=1,
            max_retries=_WORKER_RETRIES,  # without a bound Ray starts a crashing task again for ever
        )
    try:
        decoded = rows.materialize()
        rows_by_index: dict[int, dict[str, Any]] = {}
        for batch in decoded.select_columns(_TOLD).iter_batches(batch_size=None, batch_format="pyarrow"):
            rows_by_index.update((row["index"], row) for row in batch.to_pylist())
    except ray.exceptions.RayError as error:
        raise MedVisionError(
            "Expected every labelled image to decode or to fail with a code, but a worker process died on some of them. "
            "Score the archive with an existing bundle to find the image, or look for out-of-memory kills."
        ) from error
    told = [rows_by_index[index] for index in range(len(table))]
    return DecodedImages(
        decoded,
        digests=tuple(row["digest"] for row in told),
        error_codes=tuple(row["error_code"] for row in told),
        hashes=tuple(row["perceptual_hash"] for row in told),
        facts=tuple(row["facts"] for row in told),
    )


def check_images(table: LabelTable, decoded: DecodedImages, max_failure_fraction: float) -> None:
    """Refuse labelled images of which too many failed, or of which equal ones lie in two splits.

    Raises:
        MedVisionError: the share of failures is above `max_failure_fraction`.
        LabelError: the same pixels are in more than one split.
    """
    failed = np.flatnonzero(~decoded.usable).tolist()
    if len(failed) > max_failure_fraction * len(table):
        counts = ", ".join(f"{code} {count}" for code, count in decoded.failures.items())
        raise MedVisionError(
            f"Expected at most {max_failure_fraction:.1%} of the {len(table)} labelled images to fail, but {len(failed)} "
            f"did ({counts}), for instance {row_numbers(failed[:_EXAMPLES])}. Correct or remove the rows, or raise "
            "`max_failure_fraction` to train without them."
        )
    groups = duplicate_groups(decoded.digests, table.splits)
    if groups:
        raise LabelError(
            f"Expected every image in one split, but {len(groups)} images have an exact copy in another split "
            f"(the first: {row_numbers(groups[0])}). Measured on such a split a model looks better than it is: remove the "
            "copies, or give them one split."
        )


def _check_store(table: LabelTable, preprocess: PreprocessConfig) -> None:
    """Every node that trains maps all images, so they must fit the smallest node's object store."""
    import ray

    stores = [
        node["Resources"].get("object_store_memory", 0.0)
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    ]
    kept = int((table.splits != "test").sum())
    needed = kept * preprocess.size[0] * preprocess.size[1] * (preprocess.channels + 1)
    room = min(stores, default=0.0)
    if needed > _STORE_SHARE * room:
        raise MedVisionError(
            f"Expected the prepared train and val images to take at most {_STORE_SHARE:.0%} of the smallest node's object "
            f"store ({room / 1e9:.1f} GB), but {kept} images take {needed / 1e9:.1f} GB. Give Ray a larger store "
            "(`ray.object_store_bytes`, or `ray start --object-store-memory`), or a smaller `preprocess.size`."
        )


def _requests(table: LabelTable, cpus: int) -> list[pa.Table]:
    """One table a block: small enough that every CPU gets several."""
    rows = pa.table(
        {
            "index": pa.array(range(len(table)), pa.int64()),
            "uri": pa.array(table.uris, pa.string()),
            "mask_uri": pa.array(table.masks, pa.string()),
            "keep": pa.array((table.splits != "test").tolist(), pa.bool_()),
        }
    )
    size = min(_MOST_BLOCK_ROWS, max(1, len(table) // (_BLOCKS_PER_CPU * cpus)))
    return [rows.slice(start, size) for start in range(0, len(table), size)]


def _decode_batch(
    requests: pa.Table, decode: DecodeConfig, preprocess: PreprocessConfig, reader: Pseudonymiser
) -> pa.Table:
    import cv2

    cv2.setNumThreads(1)  # Ray runs one task a CPU
    return pa.Table.from_pylist(
        [_decode_row(request, decode, preprocess, reader) for request in requests.to_pylist()], schema=SCHEMA
    )


def _decode_row(
    request: dict[str, Any], decode: DecodeConfig, preprocess: PreprocessConfig, reader: Pseudonymiser
) -> dict[str, Any]:
    try:
        return _prepare_row(request, decode, preprocess, reader)
    except DecodeError as error:
        code = error.code.value
    except StorageError as error:
        code = error.code
    return {"index": request["index"], "digest": "", "error_code": code, "perceptual_hash": b""}


def _prepare_row(
    request: dict[str, Any], decode_config: DecodeConfig, preprocess: PreprocessConfig, reader: Pseudonymiser
) -> dict[str, Any]:
    from medvision_ray.imaging.decode import decode
    from medvision_ray.imaging.preprocess import prepare

    image = decode(storage.read_bytes(request["uri"], max_bytes=decode_config.max_bytes), decode_config, reader)
    prepared = prepare(image, preprocess)
    frame, truth = image.frames // 2, None
    row: dict[str, Any] = {
        "index": request["index"],
        "digest": _digest(image),
        "perceptual_hash": perceptual_hash(prepared, frame),
        "facts": image_facts(image, prepared),
    }
    if request["mask_uri"] is not None:
        data = storage.read_bytes(request["mask_uri"], max_bytes=decode_config.max_bytes)
        truth = _mask_of(decode(data, decode_config), image)
        areas = truth.reshape(len(truth), -1).sum(axis=1)
        frame = int(areas.argmax()) if areas.any() else frame
    if request["keep"]:
        row["pixels"] = prepared.pixels[frame].tobytes()
        if truth is not None:
            row["mask"] = prepared.transform.mask_to_model(truth[frame]).tobytes()
    return {**row, "error_code": ""}


def _mask_of(mask: MedicalImage, image: MedicalImage) -> NDArray[np.bool_]:
    """The mask of every frame, `(frames, rows, columns)`; any value but 0 is lesion.

    A mask has the image's rows, columns and frames. Of an image of several frames the one with the largest lesion is
    trained on, and the middle one where there is no mask or no lesion: one sample an image.
    """
    if (mask.frames, mask.shape) != (image.frames, image.shape):
        raise DecodeError(ErrorCode.DIMENSION_MISMATCH)
    lesion = mask.pixels != 0
    return np.asarray(lesion.any(axis=-1) if lesion.ndim == 4 else lesion)


def _digest(image: MedicalImage) -> str:
    pixels = np.ascontiguousarray(image.pixels)
    digest = hashlib.sha256(f"{pixels.shape} {pixels.dtype.str} ".encode())
    digest.update(pixels.data)
    return digest.hexdigest()
