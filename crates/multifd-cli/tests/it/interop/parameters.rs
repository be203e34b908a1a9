//! `docs/use/parameters.md` checked against real QEMUs: their ranges, defaults and refusals, through the monitor.

use multifd_testkit::qemu::{Error, PATIENCE, Qemu, Vm};
use serde_json::json;

use crate::table::{self, Range, parameters};

/// Whether QEMU accepted it. An answer other than a refusal is a failure of the test.
fn taken(answer: Result<(), Error>) -> Result<bool, Error> {
    match answer {
        Ok(()) => Ok(true),
        Err(error) if error.refusal().is_some() => Ok(false),
        Err(error) => Err(error),
    }
}

fn ranges_and_defaults(qemu: &Qemu, version: (u32, u32)) -> Result<(), Error> {
    let mut vm = qemu.vm().paused().start()?;
    let defaults = vm.execute("query-migrate-parameters", json!({}))?;
    for row in parameters() {
        let name = row.name.as_str();
        let there = row.since <= version;
        assert_eq!(defaults.get(name).is_some(), there, "{name}");
        let (good, bad) = match &row.range {
            // 2^64 is not an integer in JSON here, and QEMU reads -1 as 2^64 - 1.
            Range::Numbers(least, u64::MAX, _) => {
                (vec![json!(least), json!(u64::MAX)], vec![json!(2f64.powi(64))])
            }
            Range::Numbers(least, most, _) => {
                (vec![json!(least), json!(most)], vec![json!(i128::from(*least) - 1), json!(most + 1)])
            }
            Range::Words(words) => {
                (words.iter().map(|word| json!(word)).collect(), vec![json!("no-such-word")])
            }
            Range::Text => (vec![json!("x")], Vec::new()),
        };
        if there {
            let found = &defaults[name];
            let found = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
            assert_eq!(found, row.default, "{name}");
        }
        for value in good {
            let answer = taken(vm.set_parameters(json!({ name: value })))?;
            assert_eq!(answer, there, "{name} {value}");
        }
        for value in bad {
            let answer = taken(vm.set_parameters(json!({ name: value })))?;
            let unjudged = version == (7, 2) && name.ends_with("-level") && value != -1;
            assert_eq!(answer, unjudged, "{name} {value}");
            if unjudged {
                let kept = vm.execute("query-migrate-parameters", json!({}))?;
                assert_eq!(kept[name], defaults[name], "{name} {value}");
            }
        }
    }
    let found = vm.execute("query-migrate-capabilities", json!({}))?;
    let found = found.as_array().expect("a list");
    for row in table::rows("## Capabilities that apply") {
        let (major, minor) = row[1].split_once('.').expect("a version");
        let since: (u32, u32) = (major.parse().expect("a number"), minor.parse().expect("a number"));
        let there = found.iter().any(|entry| entry["capability"] == row[0].trim_matches('`'));
        assert_eq!(there, since <= version, "{row:?}");
    }
    Ok(())
}

/// Whether it refused, or failed a migration that it had accepted.
fn is_refusal(error: &Error) -> bool {
    error.refusal().is_some() || error.to_string().contains(r#""status":"failed""#)
}

/// Sets two parameters on a machine that has both.
type Together = fn(&mut Vm) -> Result<(), Error>;

const COMBINATIONS: [(&str, Together); 14] = [
    ("channels and a transport with one connection", |vm| {
        vm.set_capabilities(&[("multifd", true)])?;
        vm.migrate("exec:cat > /dev/null")?;
        // 7.2 refuses when it opens the channels.
        vm.wait_migration("completed", PATIENCE).map(drop)
    }),
    ("a level without its method", |vm| vm.set_parameters(json!({ "multifd-zstd-level": 3 }))),
    ("`zero-page-detection` multifd and multifd off", |vm| {
        vm.set_parameters(json!({ "zero-page-detection": "multifd" }))
    }),
    ("`tls-hostname` without `tls-creds`", |vm| vm.set_parameters(json!({ "tls-hostname": "x" }))),
    ("`tls-authz` without `tls-creds`", |vm| vm.set_parameters(json!({ "tls-authz": "x" }))),
    ("`mapped-ram` and compressed channels", |vm| {
        vm.set_capabilities(&[("multifd", true)])?;
        vm.set_parameters(json!({ "multifd-compression": "zlib" }))?;
        vm.set_capabilities(&[("mapped-ram", true)])?;
        vm.migrate("file:/dev/null")
    }),
    ("`mapped-ram` and TLS", |vm| {
        vm.set_capabilities(&[("mapped-ram", true)])?;
        vm.execute("object-add", json!({ "qom-type": "tls-creds-anon", "id": "t", "endpoint": "client" }))?;
        vm.set_parameters(json!({ "tls-creds": "t" }))?;
        vm.migrate("file:/dev/null")
    }),
    ("multifd and `xbzrle`", |vm| vm.set_capabilities(&[("multifd", true), ("xbzrle", true)])),
    ("multifd and `postcopy-ram`", |vm| vm.set_capabilities(&[("multifd", true), ("postcopy-ram", true)])),
    ("`max-cpu-throttle` below `cpu-throttle-initial`", |vm| {
        vm.set_parameters(json!({ "cpu-throttle-initial": 50 }))?;
        vm.set_parameters(json!({ "max-cpu-throttle": 49 }))
    }),
    ("a method of `multifd-compression` without multifd", |vm| {
        vm.set_parameters(json!({ "multifd-compression": "zlib" }))?;
        vm.migrate("exec:cat > /dev/null")?;
        vm.wait_migration("completed", PATIENCE).map(drop)
    }),
    ("`zero-copy-send` without multifd", |vm| vm.set_capabilities(&[("zero-copy-send", true)])),
    ("`zero-copy-send` and compression", |vm| {
        vm.set_parameters(json!({ "multifd-compression": "zlib" }))?;
        vm.set_capabilities(&[("multifd", true), ("zero-copy-send", true)])
    }),
    ("`zero-copy-send` and TLS", |vm| {
        vm.set_parameters(json!({ "tls-creds": "x" }))?;
        vm.set_capabilities(&[("multifd", true), ("zero-copy-send", true)])
    }),
];

fn combinations(qemu: &Qemu, column: usize) -> Result<(), Error> {
    let rows = table::rows("## Combinations");
    assert_eq!(rows.len(), COMBINATIONS.len());
    let mut wrong = Vec::new();
    for row in rows {
        let (_, together) = COMBINATIONS.iter().find(|(name, _)| *name == row[0]).expect(&row[0]);
        // A separate machine: a setting must not cause the refusal of the next one.
        let mut vm = qemu.vm().paused().start()?;
        let expected = row[column] == "taken";
        match together(&mut vm) {
            Ok(()) if expected => {}
            Err(error) if !expected && is_refusal(&error) => {}
            found => wrong.push(format!("{:?} {}: {found:?}", row[0], row[column])),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

#[test]
fn ranges_and_defaults_are_those_of_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    ranges_and_defaults(&qemu, (7, 2)).unwrap();
}

#[test]
fn ranges_and_defaults_are_those_of_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    ranges_and_defaults(&qemu, (10, 0)).unwrap();
}

#[test]
fn combinations_end_as_in_7_2() {
    let Some(qemu) = Qemu::v7_2() else { return };
    combinations(&qemu, 1).unwrap();
}

#[test]
fn combinations_end_as_in_10_0() {
    let Some(qemu) = Qemu::v10_0() else { return };
    combinations(&qemu, 2).unwrap();
}
