import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from llmpilot_console.cli import pilot

pytestmark = pytest.mark.usefixtures("plugins")


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(pilot, arguments)


def test_a_contributed_command_runs() -> None:
    assert _run("greet").stdout == "hello\n"


def test_help_lists_own_and_contributed_commands_and_those_that_do_not_load() -> None:
    result = _run("--help")
    assert result.exit_code == 0
    for line in ("greet", "Say hello.", "up", "Keep the platform running", "broken", "reinstall acme-plugin"):
        assert line in result.stdout


def test_running_one_command_imports_no_other_plugin() -> None:
    script = "import sys; from llmpilot_console.cli import pilot; pilot(['greet'], standalone_mode=False); "
    script += "print([name for name in sys.modules if name.startswith('llmpilot_recommender') or name == 'xgboost'])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "hello\n[]\n"


@pytest.mark.parametrize("arguments", [["broken"], ["broken", "--users", "3"], ["broken", "--help"]])
def test_a_plugin_that_does_not_import_says_so_in_one_line(arguments: list[str]) -> None:
    result = _run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "error: 'broken' of acme-plugin does not load (ModuleNotFoundError: No module named "
        "'a_dependency_that_is_not_installed'); reinstall acme-plugin\n"
    )


def test_an_entry_point_that_is_no_command_says_so() -> None:
    result = _run("no-command")
    assert result.exit_code == 1
    assert "plugin_commands:signal is no click command" in result.stderr


def test_an_unknown_command_is_refused_with_the_nearest_name() -> None:
    result = _run("great")
    assert result.exit_code == 2
    assert "No such command 'great'. Did you mean 'greet'?" in result.stderr


def test_invalid_input_is_printed_one_line_per_violation() -> None:
    result = _run("refuse-input")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        "error: the input is not valid\n  - users: must be > 0, is 0\n  - itl_ms: must be > 0, is -1\n"
    )


def test_any_other_error_is_one_line() -> None:
    result = _run("refuse")
    assert result.exit_code == 1
    assert result.stderr == "error: no model is trained: run `llm-pilot train`\n"


def test_an_error_out_of_a_task_group_is_one_line() -> None:
    result = _run("refuse-in-tasks")
    assert result.exit_code == 1
    assert result.stderr == "error: NATS does not answer: check that it runs\n"


def test_ctrl_c_while_modules_load_says_cancelled() -> None:
    script = """
import sys
class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == "llmpilot_console.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from llmpilot_console.__main__ import main
main()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (130, "cancelled\n")


def test_an_interrupted_command_says_cancelled() -> None:
    result = _run("interrupted")
    assert result.exit_code == 130
    assert result.stderr == "cancelled\n"


def test_version_is_printed() -> None:
    assert _run("--version").stdout.startswith("llm-pilot, version ")
