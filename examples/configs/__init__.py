"""Configs that come with the program: ``--config NAME``. Installed as ``mstar_mega.configs``."""
