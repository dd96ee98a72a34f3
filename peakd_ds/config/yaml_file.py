"""YAML as settings files use it: lists and maps of words, so that a value is what stands in the file.

YAML 1.1 reads 010 as 8, 1:30 as 90, 2020-01-01 as a date and 5e-5 as text. Here each of them stays the word that it is,
and the command line's own parser decides what it means. Only true and false (yes, no, on, off) and null are more than
words. What settings have no use for is refused: tags, anchors, aliases, a second document, deep nesting, a name twice.
"""

from typing import Any

import yaml

MAX_BYTES = 256 * 1024
MAX_DEPTH = 6


class NotSettings(ValueError):
    """A file that is not YAML, or has what settings have no use for. The message gives the remedy."""


class _Loader(yaml.SafeLoader):
    """Scalars are words, except for true, false and null."""

    kinds: tuple[str, ...] = ("bool", "null")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A map by the words of its names. Raises NotSettings for a name that is a list or a map, or is there twice."""
        values: dict[Any, Any] = {}
        for name_node, value_node in node.value:
            line = f"line {name_node.start_mark.line + 1}"
            if not isinstance(name_node, yaml.ScalarNode):
                raise NotSettings(f"{line} has a list or a map where a name belongs; write lines like 'task: rte'")
            name = name_node.value
            if name in values:
                raise NotSettings(f"{line} gives {name} a second time; delete one of the two lines")
            values[name] = self.construct_object(value_node, deep=True)
        return values


class _LoaderOfNumbers(_Loader):
    """Numbers are numbers, as `yaml.safe_dump` writes them."""

    kinds = ("bool", "null", "int", "float")


for _class in (_Loader, _LoaderOfNumbers):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in _class.kinds]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load(content: bytes | str, with_numbers: bool = False) -> Any:
    """What a YAML document holds: dicts, lists, words, bools and None.

    Args:
        with_numbers: Whether numbers become int and float, as in a file that `yaml.safe_dump` wrote.

    Raises:
        NotSettings: for every content that settings cannot have.
    """
    loader = _LoaderOfNumbers if with_numbers else _Loader
    try:
        if len(content) > MAX_BYTES:
            raise NotSettings(f"has more than {MAX_BYTES} bytes; give a file of settings")
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        _check_events(text)
        return yaml.load(text, Loader=loader)
    except UnicodeDecodeError as error:
        raise NotSettings(f"is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except NotSettings:
        raise
    except Exception as error:  # PyYAML lets errors of int(), chr() and others through
        raise NotSettings(f"is not YAML: {' '.join(str(error).split())}; fix the file") from error


def _check_events(text: str) -> None:
    """Raise NotSettings for what settings have no use for, before anything is made of it."""
    depth = num_documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"line {event.start_mark.line + 1}" if event.start_mark else "it"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise NotSettings(
                f"{where} has an anchor or an alias (& or *); write the value itself, in quotes if it is text"
            )
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise NotSettings(f"{where} has the tag {tag}; write the value without it")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        num_documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > MAX_DEPTH:
            raise NotSettings(f"{where} nests lists or maps more than {MAX_DEPTH} deep; write them flat")
        if num_documents > 1:
            raise NotSettings(f"{where} starts a second document; give each a file of its own")
