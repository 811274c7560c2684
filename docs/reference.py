"""How the reference reads the package: examples are blocks of code, and made functions have their own signatures."""

import re

import griffe

import natgrad_jax  # noqa: F401, which griffe, with paths of its own, would not find

EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$).*\n?)*)(?:\n^>>> .*\n?(?:^(?!\s*$).*\n?)*)*", re.MULTILINE)


class Reference(griffe.Extension):
    """A fence around each example; functions of methods, which are made of settings, as they are when imported."""

    def on_object(self, *, obj, **_):
        """Examples of what is read."""
        fence(obj)

    def on_package(self, *, pkg, **_):
        """Functions of methods: imported, since the source says only what they are made of."""
        methods = pkg["methods"]
        for name in list(methods.modules):
            found = griffe.inspect(name, filepath=methods[name].filepath, parent=methods)
            for public in (name, f"scale_by_{name}"):
                if public in methods[name].members:
                    methods[name].set_member(public, found[public])
                    fence(found[public])


def fence(obj):
    """A fence around each example of a docstring that has none yet."""
    if obj.docstring and ">>> " in obj.docstring.value and "```pycon" not in obj.docstring.value:
        obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", obj.docstring.value)
