"""What two or three finished networks share and what sets them apart, as one page: measures, figures, words, HTML."""
