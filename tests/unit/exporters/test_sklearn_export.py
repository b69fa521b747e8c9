def test_a_bare_estimator_of_numbers_takes_them_as_one_matrix(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(rng.normal(size=(200, 3)), columns=["a", "b", "c"])
    truth = rows["a"] * 2 - rows["c"]
    forest = RandomForestRegressor(5, random_state=0).fit(rows, truth)
    path = export_sklearn(forest, rows, tmp_path, "forest", 1, target=truth)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["tabular"]["layout"] == "matrix"
    assert [i["shape"] for i in manifest["inputs"]] == [[-1, 3]]
