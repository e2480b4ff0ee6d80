"""How the embedded family is trained: ``python -m training --all``. PLAN.md says what and why; nothing here is in the wheel."""
