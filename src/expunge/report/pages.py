"""Any folder that a command wrote, and its page: which kind it is shows in its files."""

from __future__ import annotations

from pathlib import Path

from expunge.report import attack_record, calibration_record, evaluation_page, search_record
from expunge.report.attack_page import attack_document
from expunge.report.build import build_report
from expunge.report.calibration_page import calibration_document
from expunge.report.document import AUDIT, STUDY, Document, read_document
from expunge.report.document_page import build_document_report, told_record, write_page
from expunge.report.localization_page import write_localization_page
from expunge.report.localization_record import SUFFIX, beside, read_localization
from expunge.report.records import RunRecord
from expunge.report.search_page import write_search_page


def build_page(folder: Path) -> tuple[Path, str]:
    """Write `report.html` into a folder; its path, and the answer in a sentence ("" for a run, which has a table).

    The file of a mask has its page beside it. Raises UserError where the folder is none that a command wrote, or a file
    of it is broken.
    """
    folder = Path(folder)
    if folder.suffix == SUFFIX and not folder.is_dir():
        localization = read_localization(beside(folder)["record"])
        return write_localization_page(folder, localization), localization.answer
    for name in (STUDY, AUDIT):
        if (folder / name).is_file():
            return build_document_report(folder, name), read_document(folder, name).answer
    if search_record.holds_search(folder):  # beside a merged model: the page has a name of its own
        search = search_record.read_search(folder)
        return write_search_page(folder, search), search.answer
    found = _document(folder)
    if found is None:
        return build_report(folder), ""
    document, record = found
    return write_page(folder, document, record), document.answer


def _document(folder: Path) -> tuple[Document, RunRecord] | None:
    """The document of a folder that is no run, and what it says of itself."""
    if attack_record.holds_attack(folder):
        attack = attack_record.read_attack(folder)
        subjects = {name: subject.model_dump() for name, subject in attack.subjects.items()}
        data = {name: {"role": role} for name, role in attack.splits.items()}
        info = {"models": subjects, "data": data, "notes": attack.notes, "seed": attack.seed}
        return attack_document(attack), told_record(folder, info)
    if calibration_record.holds_calibration(folder):
        calibration = calibration_record.read_calibration(folder)
        sources = {"target": calibration.target, "unlearned": calibration.unlearned}
        info = {"models": {name: {"source": source} for name, source in sources.items()}}
        return calibration_document(calibration), told_record(folder, info)
    if (folder / evaluation_page.NAME).is_file():
        return evaluation_page.evaluation_document(folder), evaluation_page.read_evaluation(folder)
    return None
