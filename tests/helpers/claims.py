"""The text of a claim with two arms, and hostile characters in its statement."""

CLAIM = """method: sft
# A remark that stays.
claim: The better arm is <b>better</b>
source: nowhere
tier: tiny
arms: [base, better]
seeds: 3
conditions:
  - {says: better less base, measure: m, arm: better, against: base, at_least: 0.5}
"""
