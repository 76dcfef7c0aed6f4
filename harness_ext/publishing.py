"""The commands that publish runs, and check and export what is published."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness_ext.errors import PublishError, RecordError
from harness_ext.sweep.scoring import score_copy, score_retrieval
from harness_ext.sweep.values import parse_kind

if TYPE_CHECKING:
    from harness_ext.results.publish import Submission
    from harness_ext.results.records import PublishedRun

SHOWN = 200
"""Problems that are printed; the rest are counted."""


def publish_arguments(command: argparse.ArgumentParser) -> None:
    """What `publish` takes."""
    command.add_argument(
        "out", nargs="+", type=Path, metavar="OUT", help="folders that lm_eval's --output_path named, with --log_samples"
    )
    command.add_argument("--results", type=Path, metavar="FOLDER", help="add the records there")
    command.add_argument("--hub", metavar="ORG/NAME", help="propose the records to this dataset on the Hugging Face hub")
    command.add_argument("--model_id", default="", metavar="DEVELOPER/NAME", help="of a model that was run from a folder")
    command.add_argument(
        "--evidence", default="", metavar="TEXT", help="where a trained length is from that the config does not say"
    )
    command.add_argument("--organization", default="", metavar="NAME", help="yours")
    command.add_argument(
        "--relationship",
        choices=("first_party", "third_party", "collaborative", "other"),
        default="other",
        help="yours to the model's developer; default: other",
    )


def publish(options: argparse.Namespace) -> int:
    """Check runs of lm_eval, and add them to a folder of records or propose them to a dataset on the hub."""
    from harness_ext.results import outputs, store
    from harness_ext.results.publish import Submission

    if options.results is None and options.hub is None:
        raise PublishError("name where to publish: --results FOLDER, --hub ORG/NAME, or both")
    submission = Submission(
        model_id=options.model_id,
        evidence=options.evidence,
        organization=options.organization,
        relationship=options.relationship,
    )
    refused, files = 0, dict[str, bytes]()
    for file in outputs.find_outputs(options.out):
        try:
            published = prepare_run(file, submission)
        except PublishError as error:
            print(error, file=sys.stderr)
            refused += 1
            continue
        name, content = store.lay_out(published)
        files[name] = content
        if options.results:
            new = store.write_file(options.results / name, content)
            print(
                f"{options.results / name}: {len(published.cells)} cells, {'published' if new else 'was published before, unchanged'}"
            )
    if options.hub and files:
        from harness_ext.results.hub import propose

        address = propose(options.hub, files)
        print(
            f"{options.hub}: {f'{address} holds what is new of {len(files)} runs' if address else f'all {len(files)} runs are there'}"
        )
    if refused:
        raise PublishError(f"{refused} run{'s were' if refused > 1 else ' was'} refused, for what is said above")
    return 0


def prepare_run(file: Path, submission: Submission) -> PublishedRun:
    """The records of a results file of lm_eval. Raises PublishError that names all that is wrong with them, one line each."""
    from harness_ext.results import audit, checks, outputs
    from harness_ext.results.publish import make_records

    output = outputs.read_output(file)
    wrong = checks.check_output(output, submission, score_answer)
    if not wrong:
        published = make_records(output, submission)
        wrong = [f"{file}: {problem}" for problem in audit.audit_records(published)]
    if wrong:
        raise PublishError("\n".join([*wrong[:SHOWN], *([f"{file}: and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])]))
    return published


def score_answer(config: Mapping[str, Any], doc: Mapping[str, Any], answer: str) -> str:
    """The verdict on a generated answer, as the task gives it."""
    if config["score"] == "copy":
        return score_copy(answer, doc["answer"])
    return score_retrieval(answer, doc["values"], parse_kind(config["value"])[0])


def validate_arguments(command: argparse.ArgumentParser) -> None:
    """What `validate` takes."""
    command.add_argument("results", type=Path, metavar="FOLDER", help="of records, as publish --results wrote them")


def validate(options: argparse.Namespace) -> int:
    """Check every record of a folder: schema, arithmetic, duplicates."""
    from harness_ext.results.audit import audit_folder

    found = audit_folder(options.results, processes=min(2, os.cpu_count() or 1))
    for problem in found.problems[:SHOWN]:
        print(problem, file=sys.stderr)
    if len(found.problems) > SHOWN:
        print(f"and {len(found.problems) - SHOWN} more", file=sys.stderr)
    for note in found.notes[:SHOWN]:
        print(f"note: {note}")
    print(f"{options.results}: {found.runs} runs, {found.cells} cells, {len(found.problems)} problems, {len(found.notes)} notes")
    return 1 if found.problems else 0


def export_arguments(command: argparse.ArgumentParser) -> None:
    """What `export` takes."""
    command.add_argument("results", type=Path, metavar="FOLDER_OR_FILE", help="records, as publish --results wrote them")
    command.add_argument(
        "--format", choices=("eee", "eval_results"), required=True, help="every_eval_ever 0.3.0, or a model page's .eval_results"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="write there")
    command.add_argument("--dataset", metavar="ORG/NAME", help="for eval_results: the benchmark on the hub that has these tasks")


def export(options: argparse.Namespace) -> int:
    """Write published records in the formats of others; of a run that was made again, the newest."""
    from harness_ext.results import audit, store
    from harness_ext.results.export import to_eval_results, to_every_eval_ever

    if options.format == "eval_results" and not options.dataset:
        raise PublishError("eval_results names a benchmark on the hub that the scores belong to: --dataset ORG/NAME")
    problems: list[store.Problem] = []
    paths = store.list_files(options.results, problems) if options.results.is_dir() else [options.results]
    newest: dict[str, tuple[str, Path]] = {}
    for path in paths:
        file, found = store.read_file(path, f"{path.absolute().parent.name}/{path.name}")
        found += audit.audit_file(file) if file else ()
        problems += found
        if file and not found:
            run = file.published.run
            newest[run.evaluation_id] = max(newest.get(run.evaluation_id, ("", path)), (run.evaluation_timestamp, path))
    for _, path in newest.values():
        file, _ = store.read_file(path, path.name)
        if file is None:
            raise RecordError(f"{path} was good, and cannot be read any more; export again")
        made = to_every_eval_ever(file.published) if options.format == "eee" else [to_eval_results(file.published, options.dataset)]
        for one in made:
            store.write_file(options.out / one.path, one.content)
    for problem in problems[:SHOWN]:
        print(problem, file=sys.stderr)
    print(f"{options.out}: {len(newest)} runs exported, {len(problems)} problems")
    return 1 if problems else 0
