import pytest
import report_suite


@pytest.fixture(scope="session")
def suite_dir(tmp_path_factory):
    """A suite of three methods, one seed. Tests must not change it."""
    return report_suite.write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="session")
def report(suite_dir, tmp_path_factory):
    """The report on `suite_dir`."""
    from ta_opd.report.build import build_report

    return build_report(suite_dir, tmp_path_factory.mktemp("report") / "report.html")
