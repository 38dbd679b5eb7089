"""The paper in miniature: the study, credit against the truth, tables and figures, the credit page."""
