//! Guards against links that lead nowhere, on a code host as well as in the crate's documentation.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn chapters() -> Vec<PathBuf> {
    let mut found = vec![root().join("README.md"), root().join("docs/side-by-side/peers.md")];
    let chapters = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    found.extend(chapters.filter(|path| path.extension().is_some_and(|it| it == "md") && !path.ends_with("links.md")));
    found
}

/// The text without what is code.
fn prose(text: &str) -> String {
    let mut is_code = false;
    let lines = text.lines().filter(|line| {
        let is_fence = line.starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence && !line.starts_with("    ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// What stands between `open` and `close`, each time.
fn between<'a>(text: &'a str, open: &'a str, close: char) -> impl Iterator<Item = &'a str> {
    text.split(open).skip(1).filter_map(move |rest| rest.split_once(close)).map(|(inner, _)| inner)
}

fn definitions(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.strip_prefix('[')?.split_once("]: ")).collect()
}

fn anchors(text: &str) -> Vec<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let kept = heading.trim_start_matches('#').trim().to_lowercase();
        kept.chars().filter(|it| it.is_alphanumeric() || " -_".contains(*it)).collect::<String>().replace(' ', "-")
    };
    headings.map(anchor).collect()
}

fn assert_leads_somewhere(from: &Path, link: &str) {
    let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
    let target = if file.is_empty() { from.to_owned() } else { from.parent().unwrap().join(file) };
    assert!(target.exists(), "{}: {link} leads to no file", from.display());
    if let Some(anchor) = anchor {
        let anchors = anchors(&prose(&fs::read_to_string(&target).unwrap()));
        assert!(anchors.iter().any(|known| known == anchor), "{}: {link} leads to none of {anchors:?}", from.display());
    }
}

#[test]
fn each_relative_link_leads_to_a_file_and_a_heading() {
    let mut count = 0;
    for chapter in chapters() {
        let text = prose(&fs::read_to_string(&chapter).unwrap());
        let links = between(&text, "](", ')').chain(definitions(&text).into_values());
        for link in links.filter(|link| !link.contains("://") && !link.starts_with("crate::")) {
            assert_leads_somewhere(&chapter, link);
            count += 1;
        }
    }
    assert!(count > 50, "only {count} links were found");
}

#[test]
fn each_link_to_an_item_is_defined_for_a_code_host_and_for_the_crates_documentation() {
    let items = fs::read_to_string(root().join("docs/links.md")).unwrap();
    let items = definitions(&items);
    for chapter in chapters() {
        let text = prose(&fs::read_to_string(&chapter).unwrap());
        let own = definitions(&text);
        for name in between(&text, "][", ']') {
            assert!(own.contains_key(name), "{}: [{name}] is not defined there", chapter.display());
            assert!(items.contains_key(name), "{}: [{name}] is not defined in links.md", chapter.display());
        }
    }
}

#[test]
fn each_chapter_has_one_title_and_it_comes_first() {
    for chapter in chapters() {
        let text = prose(&fs::read_to_string(&chapter).unwrap());
        assert!(text.starts_with("# "), "{}", chapter.display());
        let titles = text.lines().filter(|line| line.starts_with("# ")).count();
        assert_eq!(titles, 1, "{}", chapter.display());
    }
}
