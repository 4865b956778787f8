//! The floors of the house: a file imports only from its own folder and from lower floors.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The floors, lowest first. `lib.rs` stands above them all and holds no logic.
const FLOORS: [&str; 11] =
    ["base", "trace", "source", "engine", "observe", "heap", "pool", "gpu", "persist", "api", "manager"];

fn rust_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            found.push(path);
        }
    }
}

/// The code of a file: without comments, and without what follows `#[cfg(test)]`, where tests may look up.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// First path segments named after `crate::`, in groups as well: `crate::{base::x, engine::y}`.
fn floors_named(code: &str) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut start = true;
            let mut word = String::new();
            for letter in group.chars() {
                match letter {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        named.insert(core::mem::take(&mut word));
                        start = true;
                        continue;
                    }
                    _ => {}
                }
                if start && (letter.is_alphanumeric() || letter == '_') {
                    word.push(letter);
                } else if !word.is_empty() {
                    start = false;
                }
            }
            named.insert(word);
        } else {
            named.insert(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
        }
    }
    named.remove("");
    named
}

#[test]
fn no_import_goes_up() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    let mut edges = 0;
    let mut wrong = Vec::new();
    for file in &files {
        let inside = file.strip_prefix(&src).unwrap();
        let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
        let floor = first.trim_end_matches(".rs");
        if ["lib", "bin", "guide"].contains(&floor) {
            continue;
        }
        let Some(rank) = FLOORS.iter().position(|name| *name == floor) else {
            panic!("{} stands on no floor: add `{floor}` to FLOORS", inside.display());
        };
        let mut text = code(&fs::read_to_string(file).unwrap());
        if inside.components().count() == 2 && inside.ends_with("mod.rs") {
            text = text.replace("super::", "crate::");
        }
        for target in floors_named(&text) {
            edges += 1;
            match FLOORS.iter().position(|name| *name == target) {
                Some(to) if to <= rank => {}
                Some(_) => wrong.push(format!("{} imports from above: {target}", inside.display())),
                // A name re-exported by lib.rs hides its floor.
                None => wrong.push(format!("{}: write `crate::<floor>::…{target}`", inside.display())),
            }
        }
    }
    assert!(edges > 0, "no import seen in {} files", files.len());
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_parser_sees_groups_and_skips_comments() {
    let text = "use crate::{base::bits, engine::{self, Span}};\n// crate::manager\nuse crate::source::os;\n";
    let named: Vec<_> = floors_named(&code(text)).into_iter().collect();
    assert_eq!(named, ["base", "engine", "source"]);
}
