//! The clients that a server allows, by name.

use super::certificate::Certificate;

/// A list of patterns. See [`TlsServerOptions::allowed_names`](super::TlsServerOptions::allowed_names).
#[derive(Clone, Debug, Default)]
pub(super) struct AllowedNames(Vec<String>);

impl AllowedNames {
    pub fn new(patterns: &[String]) -> Self {
        Self(patterns.to_vec())
    }

    /// Whether everyone with a good certificate is allowed.
    pub fn is_everyone(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of the patterns fits the certificate.
    pub fn allow(&self, certificate: &Certificate) -> bool {
        self.is_everyone() || self.0.iter().any(|pattern| fits(pattern, certificate))
    }
}

fn fits(pattern: &str, certificate: &Certificate) -> bool {
    if pattern.contains('=') {
        return matches(pattern, &certificate.subject);
    }
    let pattern = pattern.to_lowercase();
    let mut names = certificate.names.iter().chain(certificate.common_name.iter());
    names.any(|name| matches(&pattern, &name.to_lowercase()))
}

/// Whether `text` fits `pattern`, where `*` stands for any characters and `?` for one.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut read) = (0, 0);
    // Where to go on if what follows the last star does not fit: with one character more for the star.
    let mut retry = None;
    while let Some(&letter) = text.get(read) {
        match pattern.get(at) {
            Some('*') => {
                retry = Some((at, read));
                at += 1;
            }
            Some(&wanted) if wanted == letter || wanted == '?' => {
                at += 1;
                read += 1;
            }
            _ => {
                let Some((star, taken)) = retry else { return false };
                retry = Some((star, taken + 1));
                at = star + 1;
                read = taken + 1;
            }
        }
    }
    pattern.iter().skip(at).all(|&left| left == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, text) in [
            ("*", ""),
            ("a*c", "abbbc"),
            ("a*c*", "abcxc"),
            ("*.example.org", "a.b.example.org"),
            ("h?st", "host"),
            ("**x", "x"),
            ("C=UK,CN=qemu*", "C=UK,CN=qemu.host"),
        ] {
            assert!(matches(pattern, text), "{pattern} fits {text}");
        }
        for (pattern, text) in [
            ("", "a"),
            ("a*c", "abcd"),
            ("*.example.org", "example.org"),
            ("h?st", "hst"),
            ("C=UK,CN=qemu*", "C=FR,CN=qemu.host"),
            ("C=UK,CN=qemu*", "O=x,C=UK,CN=qemu"),
        ] {
            assert!(!matches(pattern, text), "{pattern} does not fit {text}");
        }
    }

    #[test]
    fn stars_take_no_exponential_time() {
        let pattern = "*a".repeat(64) + "b";
        assert!(!matches(&pattern, &"a".repeat(4096)));
    }
}
