"""Notices are plain lines on the command line."""

import sys
import warnings

from jaxmed.cli.main import plain_notice
from jaxmed.errors import Notice


def shown(category, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", plain_notice)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = original_showwarning
        warnings.warn("attention runs in plain XLA: no splash for 7 heads", category, stacklevel=1)
    return capsys.readouterr().err


def original_showwarning(message, category, filename, lineno, file=None, line=None):
    """As Python has it; pytest puts its own in place."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def test_a_notice_is_a_line_without_a_source(capsys, monkeypatch):
    assert shown(Notice, capsys, monkeypatch) == "attention runs in plain XLA: no splash for 7 heads\n"


def test_other_warnings_stay_as_they_are(capsys, monkeypatch):
    text = shown(UserWarning, capsys, monkeypatch)
    assert "UserWarning: attention runs" in text and "test_notice.py" in text
