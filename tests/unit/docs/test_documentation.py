import re
import tomllib
from pathlib import Path

import pytest
import yaml

from moe_runtime.config.load import load_config

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_configuration_in_the_readme_can_be_served(tmp_path: Path) -> None:
    from moe_runtime.launch.build import validate

    examples = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    for each in examples:
        load_config(yaml.safe_load(each))
    example = examples[0]
    assert load_config(yaml.safe_load(example)).config.name == "my-runtime"
    path = tmp_path / "config.yaml"
    path.write_text(example, encoding="utf-8")
    assert [layer.name for layer in validate(path).layers] == ["digits"]


def test_the_python_code_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    config, *_ = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "config.yaml").write_text(config.replace("50051", "0"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    # In one process: unit tests start no Ray.
    exec(code.replace('serve("config.yaml")', 'serve("config.yaml", ray=False)'), names)
    assert names["result"].outputs.shape == (16, 10)  # type: ignore[attr-defined]
    assert names["masked"].report.num_assignments == 12  # type: ignore[attr-defined]


def test_the_changelog_has_a_section_for_what_is_not_released() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_folder_of_tests_is_collected() -> None:
    collected = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    folders = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")}
    assert [f for f in folders if not f.startswith(tuple(collected["testpaths"]))] == []
