"""The commands that publish runs, and check and export what is published."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from harness_ext.errors import PublishError

SHOWN = 200
"""Problems that are printed; the rest are counted."""


def publish_arguments(command: argparse.ArgumentParser) -> None:
    """What `publish` takes."""
    command.add_argument(
        "out", nargs="+", type=Path, metavar="OUT", help="folders that lm_eval's --output_path named, with --log_samples"
    )
    command.add_argument("--results", type=Path, metavar="FOLDER", help="add the records there")
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
    """Check runs of lm_eval and add them to a folder of records."""
    from harness_ext.results import outputs, store
    from harness_ext.results.publish import Submission, make_records

    if options.results is None:
        raise PublishError("name where to publish: --results FOLDER")
    submission = Submission(
        model_id=options.model_id,
        evidence=options.evidence,
        organization=options.organization,
        relationship=options.relationship,
    )
    found = [outputs.read_output(file) for file in outputs.find_outputs(options.out)]
    made = [make_records(output, submission) for output in found]
    for published in made:
        path, new = store.write_run(options.results, published)
        print(f"{path}: {len(published.cells)} cells, {'published' if new else 'was published before, unchanged'}")
    return 0


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
