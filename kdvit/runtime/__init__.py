"""A run as a process: checkpoints on disk, signals, processes, logs.

What kdvit promises between versions:

- A student that one version has written, exported or in a checkpoint, loads in every later one.
- A run goes on in a later version by the same command. Options that its config.yaml lacks are taken at their defaults,
  so a new option's default is what was done before it. An option that is no more is named, and the run is refused: the
  first line of config.yaml says which version goes on with it.
- A cache of teacher outputs is read by the versions alone that wrote it, of kdvit and of the libraries that its
  manifest names: its pixels and outputs depend on them.
"""
