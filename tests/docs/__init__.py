"""Every command that the documentation shows is run, and what it prints is what the page shows.

A page's code blocks are run from its top to its end, in one folder. What a block's language means:

- ``console``: lines after ``$ `` are commands, what follows is their output. Both output and exit code are held (see `agreement`).
- ``sh``: commands for files that the reader has. They run on small stand-ins (`tests.standins`) and must succeed; no output is shown.
- ``python``: a program, run as it stands.
- ``text``, ``yaml``, ``json``, ``toml``, ``python``: below a comment ``file: NAME`` the block is that file's text, which commands after it find.
- ``text``: no command.

A comment before a block says what is special about it: ``<!-- not run: REASON -->``, ``<!-- fails -->`` (its last command ends with another exit code than 0), ``<!-- file: NAME -->``.
``<!-- made: FILE -->`` before a picture says which file of the page's commands it is; of several files it has the pictures side by side.

``python -m tests.docs --renew PAGE...`` runs the pages and writes into them what their commands print, and their pictures; without PAGE it renews all.
"""
