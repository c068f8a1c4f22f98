//! What a name means before any file is looked at.

use std::path::{Path, PathBuf};
use vellum_core::{Code, Error, Result};

/// The path that a user's `name` means: the name itself, or what a `file:` URL says.
pub(crate) fn from_user(name: &str) -> Result<PathBuf> {
    if name.is_empty() {
        return Err(Error::new(Code::Usage, "an empty file name"));
    }
    if name.contains('\0') {
        return Err(nul(name));
    }
    match scheme(name) {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("file") => file_url(name, rest),
        Some((scheme, rest)) if rest.starts_with("//") => {
            Err(Error::new(Code::Feature, format!("{scheme}:// is not supported yet"))
                .image(name)
                .hint("copy it to a local file first; a local file with such a name is ./NAME"))
        }
        _ => Ok(PathBuf::from(name)),
    }
}

/// The paths that a `name` found in an image may mean, best first; relative ones to the directory of the image.
///
/// The name is written by whoever made the image. What cannot be a local file is refused here.
pub(crate) fn from_image(name: &str) -> Result<Vec<PathBuf>> {
    if name.contains('\0') {
        return Err(nul(name));
    }
    if name.is_empty() {
        return Err(
            Error::new(Code::ExternalRef, "the image names a file but the name is empty").hint(NAME_IT)
        );
    }
    let bytes = name.as_bytes();
    if let [letter, b':', ..] = bytes
        && letter.is_ascii_alphabetic()
    {
        return Err(windows(name));
    }
    if name.starts_with(r"\\?\") || name.starts_with(r"\\.\") {
        let network = name.get(4..7).is_some_and(|next| next.eq_ignore_ascii_case("UNC"));
        return Err(if network { remote(name, "a file on another machine (UNC)") } else { windows(name) });
    }
    if bytes.starts_with(br"\\") || bytes.starts_with(b"//") {
        return Err(remote(name, "a file on another machine (UNC)"));
    }
    if let Some((scheme, _)) = scheme(name) {
        return Err(remote(name, &format!("something behind the protocol {scheme}:")));
    }
    let mut paths = vec![PathBuf::from(name)];
    if name.contains('\\') {
        // Written on Windows, most likely; but a backslash may be part of a name here.
        paths.push(PathBuf::from(name.replace('\\', "/")));
    }
    Ok(paths)
}

/// What an image's name that leads nowhere good can be replaced with.
pub(crate) const NAME_IT: &str = "if you know the file, name it with --parent FILE";

fn nul(name: &str) -> Error {
    Error::new(Code::NulInName, "a file name cannot hold a NUL byte").found(name)
}

fn remote(name: &str, what: &str) -> Error {
    Error::new(Code::RemoteRef, format!("the image names {what}; images may name local files only"))
        .found(name)
        .hint("fetch it yourself if you trust it, and name it with --parent FILE")
}

fn windows(name: &str) -> Error {
    Error::new(Code::ExternalRef, "the image names a path of Windows, which does not exist on this machine")
        .found(name)
        .hint(NAME_IT)
}

/// Splits `scheme:rest`. A name with a slash before the colon has no scheme, nor has a single letter (a drive).
fn scheme(name: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = name.split_once(':')?;
    let well_formed = scheme.len() >= 2
        && scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '_'));
    well_formed.then_some((scheme, rest))
}

/// `file:///path` and `file://localhost/path` with `%20` and the like; `file:path` as it stands.
fn file_url(name: &str, rest: &str) -> Result<PathBuf> {
    let Some(authority) = rest.strip_prefix("//") else {
        return if rest.is_empty() { Err(bad_url(name)) } else { Ok(PathBuf::from(rest)) };
    };
    let at = authority.find('/').ok_or_else(|| bad_url(name))?;
    let (host, path) = authority.split_at(at);
    if !host.is_empty() && !host.eq_ignore_ascii_case("localhost") {
        return Err(Error::new(Code::Feature, "files of other machines are not supported")
            .image(name)
            .found(host)
            .allowed("file:///PATH"));
    }
    let decoded = percent_decoded(path).ok_or_else(|| bad_url(name))?;
    if decoded.contains('\0') {
        return Err(nul(name));
    }
    Ok(Path::new(&decoded).to_owned())
}

fn bad_url(name: &str) -> Error {
    Error::new(Code::Usage, "not a URL of a file").found(name).allowed("file:///PATH")
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let (high, low) = (char::from(rest.next()?).to_digit(16)?, char::from(rest.next()?).to_digit(16)?);
        bytes.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_user_types() {
        for (name, path) in [
            ("disk.vdi", "disk.vdi"),
            ("./nbd://x", "./nbd://x"),
            ("a:b.img", "a:b.img"),
            ("snap:1.qcow2", "snap:1.qcow2"),
            ("file:disk%20.img", "disk%20.img"),
            ("file:///a%20b/c.img", "/a b/c.img"),
            ("FILE://localhost/x", "/x"),
        ] {
            assert_eq!(from_user(name).unwrap(), Path::new(path), "{name}");
        }
        for (name, code) in [
            ("nbd://host/export", Code::Feature),
            ("https://example.invalid/a", Code::Feature),
            ("file://server/share", Code::Feature),
            ("file:", Code::Usage),
            ("file://", Code::Usage),
            ("file:///a%2", Code::Usage),
            ("file:///a%00b", Code::NulInName),
            ("a\0b", Code::NulInName),
            ("", Code::Usage),
        ] {
            assert_eq!(from_user(name).unwrap_err().code(), code, "{name:?}");
        }
    }

    #[test]
    fn what_an_image_says() {
        assert_eq!(from_image("base.vmdk").unwrap(), [Path::new("base.vmdk")]);
        assert_eq!(
            from_image(r".\dir\b.vhd").unwrap(),
            [Path::new(r".\dir\b.vhd"), Path::new("./dir/b.vhd")]
        );
        assert_eq!(from_image("./nbd:x").unwrap(), [Path::new("./nbd:x")]);
        for (name, code) in [
            ("nbd://host/x", Code::RemoteRef),
            ("nbd:unix:/run/x", Code::RemoteRef),
            ("json:{\"driver\":\"file\"}", Code::RemoteRef),
            ("fat:rw:/etc", Code::RemoteRef),
            ("file:///etc/passwd", Code::RemoteRef),
            ("http://169.254.169.254/", Code::RemoteRef),
            ("fd_set:1", Code::RemoteRef),
            (r"\\server\share\x.vhd", Code::RemoteRef),
            (r"\\?\UNC\server\share", Code::RemoteRef),
            ("//server/share/x", Code::RemoteRef),
            (r"C:\disks\x.vhd", Code::ExternalRef),
            ("c:x.vhd", Code::ExternalRef),
            (r"\\?\C:\x.vhd", Code::ExternalRef),
            (r"\\.\PhysicalDrive0", Code::ExternalRef),
            ("", Code::ExternalRef),
            ("a\0", Code::NulInName),
        ] {
            assert_eq!(from_image(name).unwrap_err().code(), code, "{name:?}");
        }
    }
}
