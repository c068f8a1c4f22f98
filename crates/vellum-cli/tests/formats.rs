//! `vellum formats`

mod common;
use common::Dir;

#[test]
fn every_format_is_listed() {
    let dir = Dir::new();
    let shown = dir.vellum(&["formats"]).exits(0);
    let report = dir.vellum(&["formats", "--json"]).json();
    let names: Vec<_> =
        report["formats"].as_array().unwrap().iter().map(|format| format["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["qcow2", "vmdk", "vdi", "vhd", "raw"]);
    for name in names {
        assert!(shown.out.lines().any(|line| line.starts_with(name)), "{name}");
        dir.vellum(&["formats", name]).exits(0).shows(name);
    }
}

#[test]
fn the_schema_of_options_is_published() {
    let dir = Dir::new();
    let report = dir.vellum(&["formats", "--json", "vmdk"]).json();
    let options = report["create_options"].as_array().unwrap();
    let subformat = options.iter().find(|option| option["name"] == "subformat").unwrap();
    assert_eq!(subformat["type"], "one_of");
    assert!(subformat["values"].as_array().unwrap().contains(&"streamOptimized".into()));
    for option in options {
        assert!(option["help"].as_str().is_some_and(|help| !help.is_empty()), "{option}");
        assert!(option["expert"].is_boolean() && option["default"].is_string(), "{option}");
    }
    dir.vellum(&["formats", "vmdk"]).exits(0).shows("subformat=").shows("streamOptimized");
}

#[test]
fn aliases_are_known_and_other_names_refused() {
    let dir = Dir::new();
    assert_eq!(dir.vellum(&["formats", "--json", "vpc"]).json()["name"], "vhd");
    dir.vellum(&["formats", "vhdq"]).exits(2).says("vhdq").says("vmdk");
    assert_eq!(dir.vellum(&["formats", "--json", "x"]).exits(2).any_json()["error"]["code"], "USAGE");
}
