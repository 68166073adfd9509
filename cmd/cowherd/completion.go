package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

type completionCmd struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"bash, zsh or fish."`
}

func (completionCmd) Help() string {
	return `Names of devices and snapshots are completed by asking the daemon.

Examples:

    cowherd completion bash > /etc/bash_completion.d/cowherd
    cowherd completion zsh > "${fpath[1]}/_cowherd"
    cowherd completion fish > ~/.config/fish/completions/cowherd.fish
`
}

func (c *completionCmd) Run(s *session) error {
	words := completions(s.model)
	var script string
	switch c.Shell {
	case "bash":
		script = bash.script(words)
	case "zsh":
		script = zsh.script(words)
	default:
		script = fishScript(words)
	}
	_, err := io.WriteString(s.stdout, script)
	return err
}

// completion is what may follow on a command line with some command ("" before there is one, "cow info" for one below
// another).
type completion struct {
	command, help string
	below         []completion
	flags         []completionFlag
	argument      string // a source of words for arguments, see sources
}

type completionFlag struct {
	name, help string
	takesValue bool
	value      string // a source of words for its value
}

// Sources of words, beside lists ("=a b c") and the keys of nameWords.
const (
	noWords   = "" // nothing is known
	fileWords = "file"
)

// nameWords are the shell commands that print names, for values tagged so.
func nameWords() map[string]string {
	return map[string]string{
		"device":   "cowherd ls --quiet 2>/dev/null | grep -v @",
		"snapshot": "cowherd ls --quiet 2>/dev/null | grep @",
		"any":      "cowherd ls --quiet 2>/dev/null",
	}
}

// completions finds out what the grammar takes: first what is known without a command, then each command, and behind it
// the commands below it.
func completions(app *kong.Application) []completion {
	root := completion{flags: flagsOf(app.Flags)}
	var names []string
	all := []completion{{}}
	for _, command := range app.Children {
		if command.Hidden {
			continue
		}
		names = append(names, command.Name)
		c := newCompletion("", command, root.flags)
		all = append(append(all, c), c.below...)
	}
	root.argument = "=" + strings.Join(names, " ")
	all[0] = root
	return all
}

// newCompletion is the completion of a command; above is the one that it is below, with a space behind it.
func newCompletion(above string, command *kong.Node, more []completionFlag) completion {
	c := completion{command: above + command.Name, help: command.Help, argument: noWords}
	c.flags = append(flagsOf(command.Flags), more...)
	var names []string
	for _, sub := range command.Children {
		names = append(names, sub.Name)
		c.below = append(c.below, newCompletion(c.command+" ", sub, more))
	}
	if len(names) > 0 {
		c.argument = "=" + strings.Join(names, " ")
	} else if len(command.Positional) > 0 {
		// The last argument: the ones before it are names that do not exist yet, or words of the same kind.
		c.argument = source(command.Positional[len(command.Positional)-1])
	}
	return c
}

func flagsOf(flags []*kong.Flag) []completionFlag {
	var found []completionFlag
	for _, f := range flags {
		if f.Hidden {
			continue
		}
		c := completionFlag{name: f.Name, help: f.Help, takesValue: !f.IsBool()}
		if c.takesValue {
			c.value = source(f.Value)
		}
		if f.Tag.Negatable != "" {
			c.name = "no-" + f.Name // without the "no" it is the default
		}
		found = append(found, c)
	}
	return found
}

// source is where words for a value come from.
func source(v *kong.Value) string {
	if tag := v.Tag.Get("complete"); tag != "" {
		return tag
	}
	words := slices.DeleteFunc(v.EnumSlice(), func(s string) bool { return s == "" })
	if len(words) > 0 {
		return "=" + strings.Join(words, " ")
	}
	return noWords
}

// caseShell is a shell whose script is one function with two case statements: over the command and the word before
// the cursor, for values of flags, and over the command and the word at the cursor, for the rest.
type caseShell struct {
	// before and after enclose the case statements; before sets command, its place i, prev and cur.
	before, after string
	// below adds the word behind the command to it, if the cursor is behind that.
	below string
	// words, command and files are the statements that offer given words, the lines that a command prints, and files.
	words, command, files string
}

var bash = caseShell{
	before: `_cowherd() {
  local cur prev words cword command= i
  COMPREPLY=()
  if declare -F _get_comp_words_by_ref >/dev/null; then
    _get_comp_words_by_ref -n @: cur prev words cword
  else
    words=("${COMP_WORDS[@]}"); cword=$COMP_CWORD; cur=${words[cword]}; prev=${words[cword-1]}
  fi
  for ((i = 1; i < cword; i++)); do
    [[ ${words[i]} == -* || ${words[i-1]} == --control ]] || { command=${words[i]}; break; }
  done
`,
	after: `  if declare -F __ltrim_colon_completions >/dev/null; then __ltrim_colon_completions "$cur"; fi
}
complete -o filenames -o bashdefault -F _cowherd cowherd
`,
	below:   `((i + 1 < cword)) && command+=" ${words[i+1]}"`,
	words:   `COMPREPLY=($(compgen -W '%s' -- "$cur"))`,
	command: `COMPREPLY=($(compgen -W "$(%s)" -- "$cur"))`,
	files:   `COMPREPLY=($(compgen -f -- "$cur"))`,
}

// The end of zsh's works both for a file in $fpath, which is run as the function itself, and for one that is sourced.
var zsh = caseShell{
	before: `#compdef cowherd
_cowherd() {
  local cur=$PREFIX prev=${words[CURRENT-1]} command= i
  for ((i = 2; i < CURRENT; i++)); do
    [[ ${words[i]} == -* || ${words[i-1]} == --control ]] || { command=${words[i]}; break }
  done
`,
	after: `}
if [[ ${funcstack[1]} == _cowherd ]]; then _cowherd "$@"; else compdef _cowherd cowherd; fi
`,
	below:   `((i + 1 < CURRENT)) && command+=" ${words[i+1]}"`,
	words:   `compadd -- %s`,
	command: `compadd -- ${(f)"$(%s)"}`,
	files:   `_files`,
}

// script is the whole script.
func (sh *caseShell) script(all []completion) string {
	var b strings.Builder
	b.WriteString(sh.before + "  case $command in\n")
	for _, c := range all {
		if len(c.below) > 0 {
			fmt.Fprintf(&b, "  (%s) %s ;;\n", c.command, sh.below)
		}
	}
	b.WriteString("  esac\n  case $command:$prev in\n")
	for _, c := range all {
		for _, f := range c.flags {
			if f.takesValue {
				fmt.Fprintf(&b, "  (\"%s\":--%s) %s; return ;;\n", c.command, f.name, sh.offer(f.value))
			}
		}
	}
	b.WriteString("  esac\n  case $command:$cur in\n")
	for _, c := range all {
		var names []string
		for _, f := range c.flags {
			names = append(names, "--"+f.name)
		}
		fmt.Fprintf(&b, "  (\"%s\":-*) %s ;;\n", c.command, sh.offer("="+strings.Join(names, " ")))
		fmt.Fprintf(&b, "  (\"%s\":*) %s ;;\n", c.command, sh.offer(c.argument))
	}
	b.WriteString("  esac\n" + sh.after)
	return b.String()
}

// offer is the statement that offers the words of a source.
func (sh *caseShell) offer(source string) string {
	if words, ok := strings.CutPrefix(source, "="); ok {
		return fmt.Sprintf(sh.words, words)
	}
	if command, ok := nameWords()[source]; ok {
		return fmt.Sprintf(sh.command, command)
	}
	if source == fileWords {
		return sh.files
	}
	return ":"
}

// fishArguments are the options of fish's complete that offer the words of a source.
func fishArguments(source string) string {
	if words, ok := strings.CutPrefix(source, "="); ok {
		return " -x -a " + fishQuote(words)
	}
	if command, ok := nameWords()[source]; ok {
		return " -x -a " + fishQuote("("+command+")")
	}
	if source == fileWords {
		return " -r -F"
	}
	return " -x"
}

func fishScript(all []completion) string {
	var b strings.Builder
	b.WriteString("complete -c cowherd -f\n")
	for _, c := range all {
		condition := "__fish_use_subcommand"
		if c.command != "" {
			condition = "__fish_seen_subcommand_from " + strings.ReplaceAll(c.command, " ", "; and __fish_seen_subcommand_from ")
			if !strings.Contains(c.command, " ") {
				fmt.Fprintf(&b, "complete -c cowherd -n __fish_use_subcommand -a %s -d %s\n", c.command, fishQuote(c.help))
			}
			if arguments := condition; c.argument != noWords {
				for _, sub := range c.below { // once there is one, it is its arguments that are wanted
					arguments += "; and not __fish_seen_subcommand_from " + strings.TrimPrefix(sub.command, c.command+" ")
				}
				fmt.Fprintf(&b, "complete -c cowherd -n %s%s\n", fishQuote(arguments), fishArguments(c.argument))
			}
		}
		for _, f := range c.flags {
			value := ""
			if f.takesValue {
				value = fishArguments(f.value)
			}
			fmt.Fprintf(&b, "complete -c cowherd -n %s -l %s%s -d %s\n", fishQuote(condition), f.name, value, fishQuote(f.help))
		}
	}
	return b.String()
}

// fishQuote quotes a word for fish.
func fishQuote(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}
