"""The model card: facts of training and evaluations, the owner's parts kept, no identifier, the model unchanged."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from medvision_ray import tables
from medvision_ray.bundle import Bundle, load_bundle, save_bundle
from medvision_ray.cli import main
from medvision_ray.config import ModelConfig, PreprocessConfig
from medvision_ray.ensemble import save_ensemble
from medvision_ray.errors import BundleError, UsageError
from medvision_ray.fingerprint import Fingerprint, reference_of_categories
from medvision_ray.model_card import TO_FILL_IN, model_card
from medvision_ray.reporting.card import refresh_card

NOW = datetime(2026, 11, 26, tzinfo=timezone.utc)
TRAINED: dict[str, Any] = {
    "epochs": 3,
    "labels": {
        split: {
            "images": 10 * n,
            "patients": n,
            "classes": {"cavity": n, "consolidation": 2 * n, "nodule": 3 * n},
            "with_mask": 1,
            "unlabelled": 4,
        }
        for n, split in ((7, "train"), (2, "val"), (1, "test"))
    },
    "leakage": {
        "exact_copies_within_a_split": {"train": 2, "val": 1, "test": 0},
        "near_duplicates": {"pairs": 2, "compared": 100, "images": {"train": 2, "val": 0, "test": 2}, "examples": []},
    },
    "shortcuts": {
        "sentence": "SHORTCUT: the scanner tells `nodule`.",
        "classes": {"device": {"nodule": {"auroc": 0.91, "ci_low": 0.85, "ci_high": 0.95}}},
    },
}


@pytest.fixture
def written(bundle: Bundle, tmp_path: Path) -> Bundle:
    sexes = reference_of_categories(["F"] * 30 + ["M"] * 60 + ["O"] * 4 + [None] * 6, ["p"] * 100, "train")
    assert sexes is not None
    return save_bundle(
        str(tmp_path / "bundle"),
        **{name: getattr(bundle, name) for name in ("name", "architecture", "preprocess", "classes", "multi_label")},
        **{name: getattr(bundle, name) for name in ("thresholds", "mask_threshold")},
        trained=TRAINED,
        metrics={"val_f1": 0.8},
        train_digest=["0" * 16] * 70,
        model=bundle.build_model(),
        fingerprint=Fingerprint({"patient_sex": sexes}),
    )


def _commit(output: Path, model_id: str, key: str, when: datetime, *rows: tuple[Any, ...]) -> None:
    names = ("split", "subgroup", "subgroup_value", "class", "metric", "value", "ci_low", "ci_high")
    same = {"run_key": key, "model_id": model_id, "dataset": "chest", "n_images": 80, "n_patients": 20}
    listed = [{**same, "measured_at": when, **dict(zip(names, row, strict=True))} for row in rows]
    table = pa.Table.from_pylist(listed, schema=tables.METRICS)
    tables.commit(str(output), "metrics", tables.METRICS, table.to_batches(), key)


def card_of(bundle: Bundle) -> str:
    return Path(bundle.uri, "MODEL_CARD.md").read_text()


def test_a_training_writes_its_facts_and_marks_what_is_the_owners(written: Bundle) -> None:
    card = card_of(written)
    assert card.count(TO_FILL_IN) == 2
    assert "| train | 70 | 7 | 7 | 14 | 21 | 1 | 4 |" in card
    assert "| patient_sex | M 60%, F 30%, not told or rare 10% |" in card
    assert "2 pairs among 100 images (2 of train, 2 of test)" in card
    assert "Exact copies within a split: 3." in card
    assert "SHORTCUT: the scanner tells `nodule`." in card
    assert "| device | nodule | 0.910 (0.850 to 0.950) |" in card
    assert "medvision bundle card" in card


def test_evaluations_come_from_the_newest_rows_and_drift_is_none(
    written: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = written.model_id
    whole = ("test", "all", None)
    _commit(tmp_path, model, "old", NOW - timedelta(days=1), (*whole, "all", "accuracy", 0.111, None, None))
    _commit(
        tmp_path,
        model,
        "new",
        NOW,
        (*whole, "all", "accuracy", 0.875, 0.8, 0.95),
        (*whole, "nodule", "recall", 0.75, None, None),
        (*whole, "all", "missed_masks", 12.0, None, None),
        ("test", "patient_sex", "F", "all", "accuracy", 0.6, 0.5, 0.7),
    )
    _commit(tmp_path, model, "night", NOW, (None, "drift", "height", "all", "drift_psi", 0.777, None, None))
    _commit(tmp_path, "other", "other", NOW, (*whole, "all", "accuracy", 0.222, None, None))
    assert main(["bundle", "card", written.uri, "--evaluations", str(tmp_path), "--json"]) == 0
    assert '"evaluations": 1' in capsys.readouterr().out
    card = card_of(written)
    assert "### test split of chest" in card
    assert "80 images of 20 patients" in card
    assert "| accuracy | all | 0.875 (0.800 to 0.950) |" in card
    assert "| missed_masks | all | 12 |" in card
    assert "| nodule | - | 0.750 | - | - |" in card
    assert "| patient_sex | F | 80 | 0.600 (0.500 to 0.700) | - | - | - |" in card
    for absent in ("0.111", "0.222", "0.777", "None recorded here"):
        assert absent not in card


def test_metrics_of_a_cross_validation_say_whose_they_are(written: Bundle, tmp_path: Path) -> None:
    row = ("out_of_fold", "all", None, "all", "accuracy", 0.9, 0.8, 0.95)
    _commit(tmp_path, written.model_id, "folds", NOW, row)
    refresh_card(written.uri, str(tmp_path))
    assert "### out_of_fold split of chest\nOf a cross-validation: each image by the model of its own fold" in card_of(
        written
    )


def test_images_of_the_val_split_are_not_told_as_trained_on() -> None:
    sexes = reference_of_categories(["F"] * 30, ["p"] * 30, "val")
    assert sexes is not None
    document = {
        "model_id": "m",
        "trained": {},
        "architecture": ModelConfig().model_dump(),
        "classes": ["a"],
        "multi_label": False,
    }
    document |= {"preprocess": PreprocessConfig().model_dump(), "mask_threshold": 0.5, "weights_sha256": "0"}
    assert "patient_sex" not in model_card(document, {}, 3, fingerprint=Fingerprint({"patient_sex": sexes}))


def test_a_refresh_keeps_the_owners_words_and_the_model(written: Bundle, tmp_path: Path) -> None:
    path = Path(written.uri, "MODEL_CARD.md")
    words = "Triage of adults in our emergency room.\n\nNot for children."
    first = f"{TO_FILL_IN} purpose, users, modality and body part, population, and uses that are ruled out."
    path.write_text(card_of(written).replace(first, words))
    refresh_card(written.uri, None)
    assert words in card_of(written)
    assert card_of(written).count(TO_FILL_IN) == 1
    assert load_bundle(written.uri) == written
    path.unlink()
    refresh_card(written.uri, None)
    assert card_of(written).count(TO_FILL_IN) == 2


def test_a_card_saved_with_other_line_ends_or_an_emptied_part_keeps_what_the_owner_wrote(written: Bundle) -> None:
    path = Path(written.uri, "MODEL_CARD.md")
    asked = f"{TO_FILL_IN} known failures, groups that were left out, and who answers for this model."
    text = card_of(written).replace(f"\n{asked}", "")
    text = re.sub(r"(owner: intended-use -->\n).*?(\n<!-- /owner)", r"\1Adults.\nHospital X.\2", text, flags=re.DOTALL)
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    refresh_card(written.uri, None)
    assert "<!-- owner: intended-use -->\nAdults.\nHospital X.\n<!-- /owner -->" in card_of(written)
    assert "<!-- owner: limits -->\n\n<!-- /owner -->" in card_of(written)
    assert card_of(written).count("## Evaluations") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("<!-- /owner -->", "", 1), "must be followed by its"),
        (lambda text: text.replace("<!-- owner: limits -->", "<!-- owner: intended-use -->"), "once a name"),
        (lambda text: re.sub(r"<!-- .*? -->\n", "", text), "marks of intended-use, limits are not in it"),
        (lambda text: text.replace("# Model card", "# Modèle").encode("latin-1"), "no UTF-8 text"),
    ],
)  # fmt: skip
def test_a_card_whose_owners_parts_cannot_be_told_is_not_overwritten(written: Bundle, change: Any, words: str) -> None:
    path = Path(written.uri, "MODEL_CARD.md")
    changed = change(card_of(written))
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    before = path.read_bytes()
    with pytest.raises(BundleError, match=words):
        refresh_card(written.uri, None)
    assert path.read_bytes() == before


def test_an_output_without_evaluations_of_the_model_leaves_the_card_as_it_is(written: Bundle, tmp_path: Path) -> None:
    before = card_of(written)
    with pytest.raises(UsageError, match="Expected evaluations of"):
        refresh_card(written.uri, str(tmp_path / "mistyped"))
    assert card_of(written) == before
    assert not (tmp_path / "mistyped").exists()


def test_names_are_no_marks_of_html(written: Bundle, tmp_path: Path) -> None:
    row = {"model_id": written.model_id, "dataset": "<b>x</b>", "split": "test", "measured_at": NOW, "run_key": "a"}
    row |= {"subgroup": "all", "class": "<i>", "metric": "recall", "value": 0.5, "n_images": 9, "n_patients": 9}
    table = pa.Table.from_pylist([row], schema=tables.METRICS)
    tables.commit(str(tmp_path), "metrics", tables.METRICS, table.to_batches(), "a")
    refresh_card(written.uri, str(tmp_path))
    assert "### test split of &lt;b>x&lt;/b>" in card_of(written)
    assert "| &lt;i> | - | 0.500 |" in card_of(written)


def test_an_ensemble_says_what_was_found_in_each_training(written: Bundle, tmp_path: Path) -> None:
    other = save_bundle(
        str(tmp_path / "other"),
        **{name: getattr(written, name) for name in ("architecture", "preprocess", "classes", "multi_label")},
        **{name: getattr(written, name) for name in ("thresholds",)},
        name="other",
        mask_threshold=0.4,
        trained={},
        metrics={},
        train_digest=[],
        model=written.build_model(),
    )
    card = card_of(save_ensemble(str(tmp_path / "both"), "both", "majority", [written, other]))
    assert "2 networks, whose answers are one by a majority vote." in card
    leaks, shortcuts = card[card.index("## Leakage") :].split("## Shortcuts")
    assert f"### {written.model_id}\n- Patients in two splits: none." in leaks
    assert f"### {other.model_id}\nNot recorded" in leaks
    assert "SHORTCUT: the scanner tells `nodule`." in shortcuts.split("## Validation")[0]


def test_a_bundle_of_an_earlier_version_has_a_card_too(bundle: Bundle) -> None:
    assert "Not recorded: the bundle is of an earlier version." in card_of(bundle)


def test_without_a_bundle_there_is_no_card(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="Expected a bundle"):
        refresh_card(str(tmp_path / "absent"), None)
