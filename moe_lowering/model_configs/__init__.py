"""What a model's config says before anything is built: names of model types, config.json files, their sizes and values.

- ``errors``: ``ModelError``, and how it repeats a value.
- ``values``, ``check``: what is certain to be wrong, told without importing torch or transformers.
- ``read``: the config as transformers has it; imports transformers, builds no model.

What is known of a type is read from the text of transformers' own tables and model files, where it is installed.
"""
