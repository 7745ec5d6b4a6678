"""What a training process imports, imported once in the server that forks them.

Nothing is computed: threads do not survive a fork.
"""

from recipes.training import cpu

cpu.activate()

import recipes.training.recipe  # noqa: E402
import recipes.training.run  # noqa: E402, F401
