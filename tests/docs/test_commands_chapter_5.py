"""Every command of chapter 5's page works as it is printed."""

from __future__ import annotations

from tests.docs.documents import commands_of

test_commands_work_as_printed = commands_of("recipes/ch5/README.md")
