"""Every command of chapter 4's page works as it is printed."""

from __future__ import annotations

from tests.docs.documents import commands_of

test_commands_work_as_printed = commands_of("recipes/ch4/README.md")
