//! Finds which file of a crate uses which name of which other file.
//!
//! The input is the text of a crate's files. The output is an arrow from a file to each file that defines what it uses.
//! Re-exports are followed to the definition. Code that is only compiled for tests or for models is ignored.
//!
//! A private `use` is an arrow. A visible one declares a second name and is not an arrow; a use of that name in the
//! file's own code is one. A method call names no type, so calls alone are not found.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::slice;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, Macro, Meta, UseTree, Visibility};

use crate::Failure;

/// The files that a file uses, each with the names that it uses of it.
pub(super) type Arrows = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

/// Reads the crate whose root is `root`; `files` contains at least its files, by path.
///
/// # Errors
///
/// Names a file that is not valid Rust.
pub(super) fn arrows(root: &str, files: &HashMap<&str, &str>) -> Result<Arrows, Failure> {
    let mut tree = Tree::default();
    let folder = root.rsplit_once('/').map_or("", |(folder, _)| folder);
    tree.read_file(files, root, folder, Vec::new())?;
    let mut arrows = Arrows::new();
    for use_ in &tree.uses {
        let mut found = Vec::new();
        tree.resolve(&use_.module, &use_.path, &mut HashSet::new(), &mut found);
        let file = &tree.modules[&use_.module].file;
        for (target, name) in found.into_iter().filter(|(target, _)| target != file) {
            arrows.entry(file.clone()).or_default().entry(target).or_default().insert(name);
        }
    }
    Ok(arrows)
}

/// The greatest number of names in a path, and of imports that are followed. Longer ones lead back to themselves.
const LONGEST: usize = 32;

/// The names that lead to a module from the root of the crate.
type ModulePath = Vec<String>;

#[derive(Default)]
struct Module {
    file: String,
    names: HashMap<String, Vec<Meaning>>,
    /// Paths whose whole contents are imported.
    globs: Vec<Vec<String>>,
}

enum Meaning {
    Definition,
    Module,
    /// The path that an import gives for the name.
    Import(Vec<String>),
}

/// A path used in a module.
struct Use {
    module: ModulePath,
    path: Vec<String>,
}

/// A crate.
#[derive(Default)]
struct Tree {
    modules: HashMap<ModulePath, Module>,
    uses: Vec<Use>,
}

impl Tree {
    fn read_file(
        &mut self,
        files: &HashMap<&str, &str>,
        path: &str,
        folder: &str,
        module: ModulePath,
    ) -> Result<(), Failure> {
        let text = files.get(path).ok_or_else(|| format!("{path}: expected a module's file, found none"))?;
        let file = syn::parse_file(text).map_err(|error| format!("{path}: {error}"))?;
        let mut reader = Reader { tree: self, path, folder, module, declared: Vec::new() };
        reader.enter();
        file.items.iter().for_each(|item| reader.visit_item(item));
        for (module, folder) in reader.declared {
            let name = module.last().map_or("", String::as_str);
            let flat = format!("{folder}/{name}.rs");
            let path = if files.contains_key(&*flat) { flat } else { format!("{folder}/{name}/mod.rs") };
            self.read_file(files, &path, &format!("{folder}/{name}"), module)?;
        }
        Ok(())
    }

    /// Finds the files that define the item `path` in `module`, with the defined name.
    fn resolve(
        &self,
        module: &[String],
        path: &[String],
        seen: &mut HashSet<(ModulePath, Vec<String>)>,
        found: &mut Vec<(String, String)>,
    ) {
        let Some((first, rest)) = path.split_first() else { return };
        if path.len() > LONGEST || !seen.insert((module.to_vec(), path.to_vec())) {
            return;
        }
        match first.as_str() {
            "crate" => return self.resolve(&[], rest, seen, found),
            "self" => return self.resolve(module, rest, seen, found),
            "super" => return self.resolve(&module[..module.len().saturating_sub(1)], rest, seen, found),
            _ => {}
        }
        let Some(here) = self.modules.get(module) else { return };
        let meanings = here.names.get(first);
        for meaning in meanings.into_iter().flatten() {
            match meaning {
                Meaning::Definition => found.push((here.file.clone(), first.clone())),
                Meaning::Module => self.resolve(&joined(module, slice::from_ref(first)), rest, seen, found),
                Meaning::Import(target) => self.resolve(module, &joined(target, rest), seen, found),
            }
        }
        if meanings.is_none() {
            for target in here.globs.iter().filter_map(|glob| self.module(module, glob, 0)) {
                self.resolve(&target, path, seen, found);
            }
        }
    }

    /// The module of this crate to which `path` in `module` refers; `None` for other items and for other crates.
    fn module(&self, module: &[String], path: &[String], depth: usize) -> Option<ModulePath> {
        let Some((first, rest)) = path.split_first() else { return Some(module.to_vec()) };
        if depth > LONGEST {
            return None;
        }
        match first.as_str() {
            "crate" => self.module(&[], rest, depth + 1),
            "self" => self.module(module, rest, depth + 1),
            "super" => self.module(&module[..module.len().saturating_sub(1)], rest, depth + 1),
            _ => self.modules.get(module)?.names.get(first)?.iter().find_map(|meaning| match meaning {
                Meaning::Definition => None,
                Meaning::Module => self.module(&joined(module, slice::from_ref(first)), rest, depth + 1),
                Meaning::Import(target) => self.module(module, &joined(target, rest), depth + 1),
            }),
        }
    }
}

fn joined(head: &[String], tail: &[String]) -> Vec<String> {
    [head, tail].concat()
}

/// Reads one file into the tree.
struct Reader<'a> {
    tree: &'a mut Tree,
    path: &'a str,
    /// The folder with the files of the present module's children.
    folder: &'a str,
    module: ModulePath,
    /// Modules in files of their own, with the folder of each file.
    declared: Vec<(ModulePath, String)>,
}

impl Reader<'_> {
    fn enter(&mut self) {
        self.tree.modules.entry(self.module.clone()).or_default().file = self.path.to_owned();
    }

    fn here(&mut self) -> &mut Module {
        self.tree.modules.entry(self.module.clone()).or_default()
    }

    fn means(&mut self, name: impl ToString, meaning: Meaning) {
        self.here().names.entry(name.to_string()).or_default().push(meaning);
    }

    fn uses(&mut self, path: Vec<String>) {
        self.tree.uses.push(Use { module: self.module.clone(), path });
    }

    fn import(&mut self, tree: &UseTree, prefix: &[String], private: bool) {
        let (name, path) = match tree {
            UseTree::Path(inner) => {
                return self.import(&inner.tree, &joined(prefix, &[inner.ident.to_string()]), private);
            }
            UseTree::Group(group) => {
                return group.items.iter().for_each(|inner| self.import(inner, prefix, private));
            }
            UseTree::Glob(_) => return self.here().globs.push(prefix.to_vec()),
            UseTree::Name(name) if name.ident == "self" => match prefix.last() {
                Some(last) => (last.clone(), prefix.to_vec()),
                None => return,
            },
            UseTree::Name(name) => (name.ident.to_string(), joined(prefix, &[name.ident.to_string()])),
            UseTree::Rename(name) => {
                let path = if name.ident == "self" {
                    prefix.to_vec()
                } else {
                    joined(prefix, &[name.ident.to_string()])
                };
                (name.rename.to_string(), path)
            }
        };
        if private {
            self.uses(path.clone());
        }
        // `use x::x;` of another crate would lead back to itself.
        if path.first() != Some(&name) {
            self.means(name, Meaning::Import(path));
        }
    }

    /// The tokens of a macro have no syntax yet: everything that looks like a path counts as one.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(name) => {
                    if colons != 2 && !path.is_empty() {
                        self.uses(std::mem::take(&mut path));
                    }
                    path.push(name.to_string());
                    colons = 0;
                }
                TokenTree::Punct(sign) if sign.as_char() == ':' => colons += 1,
                token => {
                    colons = 0;
                    self.uses(std::mem::take(&mut path));
                    if let TokenTree::Group(group) = token {
                        self.tokens(group.stream());
                    }
                }
            }
        }
        self.uses(path);
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let (attributes, name) = match item {
            Item::Const(item) => (&item.attrs, Some(&item.ident)),
            Item::Enum(item) => (&item.attrs, Some(&item.ident)),
            Item::Fn(item) => (&item.attrs, Some(&item.sig.ident)),
            Item::Macro(item) => (&item.attrs, item.ident.as_ref()),
            Item::Static(item) => (&item.attrs, Some(&item.ident)),
            Item::Struct(item) => (&item.attrs, Some(&item.ident)),
            Item::Trait(item) => (&item.attrs, Some(&item.ident)),
            Item::Type(item) => (&item.attrs, Some(&item.ident)),
            Item::Union(item) => (&item.attrs, Some(&item.ident)),
            Item::Impl(item) => (&item.attrs, None),
            Item::Mod(item) => (&item.attrs, None),
            Item::Use(item) => (&item.attrs, None),
            _ => return visit::visit_item(self, item),
        };
        if is_for_tests(attributes) {
            return;
        }
        if let Some(name) = name {
            self.means(name, Meaning::Definition);
        }
        visit::visit_item(self, item);
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        let name = item.ident.to_string();
        self.means(&name, Meaning::Module);
        let module = joined(&self.module, slice::from_ref(&name));
        let Some((_, items)) = &item.content else {
            self.declared.push((module, self.folder.to_owned()));
            return;
        };
        let folder = format!("{}/{name}", self.folder);
        let mut inner =
            Reader { tree: self.tree, path: self.path, folder: &folder, module, declared: Vec::new() };
        inner.enter();
        items.iter().for_each(|item| inner.visit_item(item));
        let declared = inner.declared;
        self.declared.extend(declared);
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let private = matches!(item.vis, Visibility::Inherited);
        // A path that starts with `::` is of another crate.
        if item.leading_colon.is_none() {
            self.import(&item.tree, &[], private);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !is_for_tests(&item.attrs) {
            visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            self.uses(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &'ast Macro) {
        visit::visit_macro(self, item);
        self.tokens(item.tokens.clone());
    }

    /// The names in attributes are of other crates.
    fn visit_attribute(&mut self, _: &'ast Attribute) {}
}

/// Whether an item exists only for tests or models.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("cfg") => {
            let names = names(list.tokens.clone());
            let has = |name: &str| names.iter().any(|found| found == name);
            (has("test") || has("shuttle")) && !has("not")
        }
        _ => false,
    })
}

fn names(tokens: TokenStream) -> Vec<String> {
    let names = tokens.into_iter().flat_map(|token| match token {
        TokenTree::Ident(name) => vec![name.to_string()],
        TokenTree::Group(group) => names(group.stream()),
        _ => Vec::new(),
    });
    names.collect()
}
