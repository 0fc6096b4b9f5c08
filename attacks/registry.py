"""Attacks by name."""

from collections.abc import Mapping

from attacks.accumulation import Accumulation
from attacks.analytic import Analytic
from attacks.base import Attack
from attacks.codec_aware import CodecAware, ProxyImages
from attacks.dlg import Dlg
from attacks.gradinversion import GradInversion
from attacks.idlg import Idlg
from attacks.inverting import Inverting
from attacks.labels import LabelCounts, LabelSigns
from attacks.simulation import Simulation
from tofu.errors import SettingError

ATTACKS: Mapping[str, type[Attack]] = {
    attack.name: attack
    for attack in (
        Dlg,
        Idlg,
        Inverting,
        GradInversion,
        Analytic,
        Simulation,
        CodecAware,
        ProxyImages,
        Accumulation,
        LabelSigns,
        LabelCounts,
    )
}


def make_attack(name: str) -> Attack:
    """The attack called `name`, with its own settings.

    Raises:
        SettingError: there is none.
    """
    if name not in ATTACKS:
        raise SettingError("attacks", name, f"one of {', '.join(ATTACKS)}")
    return ATTACKS[name]()
