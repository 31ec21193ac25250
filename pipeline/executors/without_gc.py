"""Imported first by the process that workers are forked from, and by nothing else: that process only imports packages,
so it need not search for garbage. Its workers do, once they are set up (`pipeline.executors.process`)."""

import gc

gc.disable()
