"""`lifeops demo`: plain against LIFE on real images that come with scikit-learn, in a few minutes on a laptop CPU."""
