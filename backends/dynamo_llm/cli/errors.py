"""What ends a command with one line on stderr. `cli.main` prints it."""


class CommandError(Exception):
    """The message is one line that says what is wrong and what to do about it."""

    exit_code = 1


class StartError(CommandError):
    """What the user asked for cannot be started: a busy port, a missing folder, an unknown option."""

    exit_code = 2
