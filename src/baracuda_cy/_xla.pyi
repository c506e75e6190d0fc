# SPDX-License-Identifier: Apache-2.0
from baracuda_cy.plan import Plan

def call_of(plan: Plan, bias: bool) -> tuple[str, bytes]: ...
