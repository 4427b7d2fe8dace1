"The Python lines of README.md run as they stand there, on fewer sentences."
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^``` ?python\n(.*?)^```$", text, flags=re.S | re.M)


@pytest.mark.filterwarnings("ignore:.*converge")  # too few sentences to converge, which the trainer says
def test_python_lines_run():
    code = "\n".join(blocks())
    assert code.count("n=5000") == 1 and code.count("rewrite_base_model") == 1
    names: dict = {}
    exec(compile(code.replace("n=5000", "n=150"), "README.md", "exec"), names)
    assert type(names["model"]).__name__ == type(names["trainer"].base_model).__name__
