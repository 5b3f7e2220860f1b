"""How a method enters peft, whose method names are a closed enum."""

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


def register_method(name: str, config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Add a member NAME to `PeftType` and the method to peft's tables, so that `PeftModel.from_pretrained` finds it.

    Doing it again changes nothing. Raises peft's own KeyError where another method has the name.
    """
    value = name.upper()
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_, member._value_ = value, value
        # The class forbids setting a member; up to Python 3.11 attribute access reads the map instead.
        type.__setattr__(PeftType, value, member)
        PeftType._member_names_.append(value)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(value)) is not config_class:
        register_peft_method(name=name, config_cls=config_class, model_cls=tuner_class)
