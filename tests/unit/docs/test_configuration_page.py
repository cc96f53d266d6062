import re
from pathlib import Path

import yaml

from moe_runtime.cli.configuration_page import current_page
from moe_runtime.config.load import load_config

DOCS = Path(__file__).parents[3] / "docs"


def test_the_configuration_page_is_the_one_that_the_models_give() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert page == current_page(), "the page is not current; run `make docs`"


def test_the_example_of_the_configuration_page_is_a_configuration() -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", current_page(), flags=re.DOTALL)
    assert load_config(yaml.safe_load(example)).config.name == "digits-demo"
