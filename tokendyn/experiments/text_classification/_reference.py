"""What counting words reaches: TF-IDF and logistic regression."""

from __future__ import annotations

from typing import Any

from tokendyn.experiments.text_classification._texts import Texts

NAME = "TF-IDF with logistic regression"


def reference(texts: Texts) -> dict[str, Any]:
    """Accuracy on the test texts of scikit-learn's logistic regression on TF-IDF of words.

    All settings are its defaults but ``sublinear_tf``, ``min_df=2``, and as many iterations as it takes; nothing is
    drawn at random.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    features = TfidfVectorizer(sublinear_tf=True, min_df=2)
    model = LogisticRegression(max_iter=1000)
    model.fit(features.fit_transform(texts.train.texts), texts.train.labels)
    accuracy = model.score(features.transform(texts.held_out.texts), texts.held_out.labels)
    return {"name": NAME, "accuracy": float(accuracy), "words": len(features.vocabulary_)}
