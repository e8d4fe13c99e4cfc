"""What a session's detector is worth, on all validation images or a few."""

from torch.utils.data import Subset

from defeat_cli.config import schema as recipes
from defeat_cli.console import Reporter
from defeat_cli.engine.evaluation import FIGURES
from defeat_cli.jobs.validating import score
from defeat_cli.session import assemble


def test_errors_are_told_of_all_images_only(tiny):
    """Of a few, every object in the others would be one that was missed."""
    session = assemble(recipes.load(str(tiny)))
    data, reporter = session.validation_data, Reporter("student", quiet=True)
    whole = score(session, session.student, reporter)
    few = score(session, session.student, reporter, subset=Subset(data, [0, 1]))
    assert {*whole} - {*few} == {"errors"}
    assert {*FIGURES} <= {*few}
    assert len(data) > 2
