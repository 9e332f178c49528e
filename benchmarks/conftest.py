import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sizes",
        choices=["full", "small"],
        default="full",
        help="full: the shapes of the README, about ten minutes on 2 cores; small: seconds, to see that it all runs",
    )
