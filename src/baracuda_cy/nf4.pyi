# SPDX-License-Identifier: Apache-2.0
from typing import Any, final

from baracuda_cy.descriptors import Nf4Descriptor, Nf4MmvqMultiMDescriptor, PlanPreference
from baracuda_cy.formats import ElementKind
from baracuda_cy.plan import Plan

class Nf4Plan(Plan): ...

class Nf4ProductPlan(Nf4Plan):
    def run(
        self,
        weight: Any,
        activations: Any,
        output: Any,
        *,
        absmax: Any = None,
        nested: Any = None,
        bias: Any = None,
        workspace: Any = None,
        stream: Any = None,
    ) -> None: ...
    def validate(
        self,
        weight: Any,
        activations: Any,
        output: Any,
        *,
        absmax: Any = None,
        nested: Any = None,
        bias: Any = None,
    ) -> None: ...
    def can_implement(
        self,
        weight: Any,
        activations: Any,
        output: Any,
        *,
        absmax: Any = None,
        nested: Any = None,
        bias: Any = None,
    ) -> bool: ...

@final
class Nf4MmvqPlan(Nf4ProductPlan):
    @classmethod
    def select(
        cls, device: Any, desc: Nf4Descriptor, preference: PlanPreference | None = None
    ) -> Nf4MmvqPlan: ...

@final
class Nf4MmvqMultiMPlan(Nf4ProductPlan):
    @classmethod
    def select(
        cls, device: Any, desc: Nf4MmvqMultiMDescriptor, preference: PlanPreference | None = None
    ) -> Nf4MmvqMultiMPlan: ...

@final
class Nf4DequantizePlan(Nf4Plan):
    @classmethod
    def select(
        cls, device: Any, desc: Nf4Descriptor, preference: PlanPreference | None = None
    ) -> Nf4DequantizePlan: ...
    def run(
        self,
        weight: Any,
        output: Any,
        *,
        absmax: Any = None,
        nested: Any = None,
        workspace: Any = None,
        stream: Any = None,
    ) -> None: ...
    def validate(
        self, weight: Any, output: Any, *, absmax: Any = None, nested: Any = None
    ) -> None: ...
    def can_implement(
        self, weight: Any, output: Any, *, absmax: Any = None, nested: Any = None
    ) -> bool: ...

def select_product(
    host: bool,
    ordinal: int,
    weight: tuple[int, int, int, int, int, bool],
    m: int,
    activation: int,
    output: int,
    bias: bool,
    preference: PlanPreference | None,
) -> Nf4MmvqMultiMPlan: ...
def select_dequantize(
    device: str,
    weight: tuple[int, int, int, int, int, bool],
    output: ElementKind,
    preference: PlanPreference | None,
) -> Nf4DequantizePlan: ...
