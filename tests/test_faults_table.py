"""docs/reliability.md lists the faults that are injected."""

import faults_table


def test_the_page_is_up_to_date():
    text = faults_table.PAGE.read_text()
    assert faults_table.page(text) == text, "run python tests/faults_table.py"


def test_the_section_finds_its_place():
    section = faults_table.section()
    assert section.count("\n| ") > 25
    for before, after in {
        "# R\n\n## Faults\n\nold\n\n## B\n\nb\n": f"# R\n\n{section}\n## B\n\nb\n",
        "# R\n\n## Faults\n\nold\n": f"# R\n\n{section}",
    }.items():
        assert faults_table.page(before) == after
        assert faults_table.page(after) == after
