"""What is trained: the plan and its rules (light, here), and how NeMo trains it (heavy, in
`recipes.training`).
"""
